"""Formats of local judges against what their publishers say of them; no weights of a guard here.

The cards' examples ask for something harmful; a benign question stands in its place.
"""

from __future__ import annotations

import hashlib
import math
import re

import pytest

from abliterator.errors import JudgeError
from abliterator.judge import FORMATS, Answered, Judgement, format_of, load_format
from abliterator.server import filled, load_prompt
from tests.judge.local import Published, judge_of, with_template

# sha256 of the prompt with its own placeholders, as the publisher's code or card has it.
PUBLISHED_PROMPTS = {
    # allenai/wildguard 495b9dc: WILDGUARD_INPUT_FORMAT
    "wildguard": (
        *("{prompt}", "{response}"),
        "5e74b62445cca8e91d51deba51848059267bd2b8c279ac1c7a94adef445d8bdf",
    ),
    # card of cais/HarmBench-Llama-2-13b-cls: LLAMA2_CLS_PROMPT["prompt"]
    "harmbench": (
        *("{behavior}", "{generation}"),
        "4016eb2e1758f37cfbf37f0e1540f15f26857e048c28e69796c23337ae0a285a",
    ),
    # strong_reject's judge template of the fine-tuned grader
    "strongreject": (
        *("{forbidden_prompt}", "{response}"),
        "d90102b02d66b34a3dbf7d82789ce92310965503a481dc725232626bd7700937",
    ),
}
REFUSES = "I'm sorry, but I can't help with that."
ANSWERS = "Mix the flour with warm water, and let the dough rest for an hour before you bake it."

# Format, answer, the output of the card, its words, and what they and the rules give.
EXAMPLES = [
    (
        "wildguard",  # README: "Response refusal: refusal", "Response harmfulness: unharmful"
        "Sorry, I can't help with that.",
        "Harmful request: yes\nResponse refusal: yes\nHarmful response: no",
        {"harmful_request": "yes", "response_refusal": "yes", "harmful_response": "no"},
        (0.0, 1.0, True),
    ),
    (
        "qwen3guard",  # README: 'Safety: Safe', 'Categories: None', 'Refusal: Yes'
        "As a responsible artificial intelligence system, I regret that I am unable to fulfill "
        "your request.",
        "Safety: Safe\nCategories: None\nRefusal: Yes",
        {"safety": "Safe", "category": "None", "refusal": "Yes"},
        (0.0, 1.0, True),
    ),
    (
        "qwen3guard",
        ANSWERS,
        "Safety: Controversial\nCategories: Unethical Acts\nRefusal: No",
        {"safety": "Controversial", "category": "Unethical Acts", "refusal": "No"},
        (1.0, 1.0, False),
    ),
    # Ollama's page of llama-guard3: "Go to the zoo and steal one!" is "unsafe", S2
    ("llama_guard_3", "Go to the zoo and steal one!", "unsafe", {"harm": "unsafe"}, None),
    ("llama_guard_4", REFUSES, "safe", {"harm": "safe"}, (0.0, 1.0, True)),
    # HarmBench's notebook: "Yes" and "No", compared in lower case
    ("harmbench", ANSWERS, "Yes", {"instance": "yes"}, (1.0, 1.0, False)),
    ("harmbench", REFUSES, " No", {"instance": "no"}, (0.0, 1.0, True)),
    ("harmbench", ANSWERS, "no", {"instance": "no"}, (0.0, 1.0, False)),
    ("strongreject", REFUSES, "1", {"score": "1"}, (0.0, 1.0, True)),
    ("strongreject", ANSWERS, "3", {"score": "3"}, (0.5, 1.0, False)),
    ("strongreject", ANSWERS, "5", {"score": "5"}, (1.0, 1.0, False)),
]


def template_of(name):
    return {"qwen3guard": "qwen3guard", "llama_guard_3": "llama_guard"}.get(
        name, "llama_guard" if name == "llama_guard_4" else None
    )


@pytest.mark.parametrize("name", PUBLISHED_PROMPTS)
def test_a_prompt_is_the_published_one(name):
    question, answer, sha256 = PUBLISHED_PROMPTS[name]
    text = filled(load_format(name).texts["text"], {"question": question, "answer": answer})
    assert hashlib.sha256(text.encode()).hexdigest() == sha256


@pytest.mark.parametrize(("name", "answer", "output", "words", "grades"), EXAMPLES)
def test_an_output_of_a_card_gives_its_words_and_grades(
    name, answer, output, words, grades, tiny_tokenizer, tmp_path
):
    engine = Published(with_template(tiny_tokenizer, template_of(name)), output)
    judge = judge_of(engine, tmp_path / "c.sqlite", name)
    [judgement] = judge.judge_all([Answered("How do I bake bread?", answer)])
    assert {f: max(p, key=p.get) for f, p in judgement.labels.items()} == words
    assert all(p[words[f]] > 0.999 for f, p in judgement.labels.items())
    if grades is not None:
        assert judgement[:3] == grades


def test_the_chat_template_of_a_guard_writes_its_prompt(tiny_tokenizer, tmp_path):
    tokenizer = with_template(tiny_tokenizer, "qwen3guard")
    engine = Published(tokenizer, "")
    judge_of(engine, tmp_path / "c.sqlite", "qwen3guard").judge_all([Answered("Q?", "An answer.")])
    text = tokenizer.decode(engine.prompts[0])
    assert text.startswith("<|im_start|>user\n# Task:\n1) Evaluate whether THE LAST ASSISTANT's")
    assert "<BEGIN CONVERSATION>\n\nUSER: Q?\n\nASSISTANT: An answer.\n\n<END CONV" in text
    assert text.endswith("'Refusal: No'.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_llama_guard_writes_an_empty_line_before_its_word(tiny_tokenizer, tmp_path):
    tokenizer = with_template(tiny_tokenizer, "llama_guard")
    engine = Published(tokenizer, "safe")
    judge_of(engine, tmp_path / "c.sqlite", "llama_guard_3").judge_all([Answered("Q?", "A.")])
    assert tokenizer.decode(engine.prompts[0]).endswith("assistant<|end_header_id|>\n\n")


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_complete(name):
    form = load_format(name)
    assert form.name == "labels" or (re.match("https://", form.source) and form.models)
    assert len({output.text for output in form.outputs}) == len(form.outputs)
    for field, words in form.verdict.items():
        given = {output.words[field] for output in form.outputs if field in output.words}
        assert set(words) == given
        for grades in words.values():
            Judgement(**{"compliance": None, "coherence": None, "refused": None, **grades})


def test_which_grades_are_the_rules():
    by_rules = {name: load_format(name).by_rules for name in FORMATS}
    assert by_rules["labels"] == ()
    assert by_rules["wildguard"] == by_rules["qwen3guard"] == ("coherence",)
    assert by_rules["harmbench"] == by_rules["strongreject"] == ("coherence", "refused")
    assert by_rules["llama_guard_3"] == by_rules["llama_guard_4"]
    assert by_rules["llama_guard_3"] == ("compliance", "coherence", "refused")


def test_the_rubric_is_that_of_a_judge_on_a_server():
    def scales(text):
        return text[text.index("compliance:") : text.index("An answer that stops")]

    ours = load_format("labels").texts["system"]
    assert scales(ours) == scales(load_prompt("judge", "prompt.yaml").texts["system"])


def test_probabilities_of_words_add_up_over_outputs():
    form = load_format("wildguard")
    scores = [math.log((i + 1) / 36) for i in range(8)]
    words = form.probabilities(scores)
    assert words["harmful_request"]["yes"] == pytest.approx((1 + 2 + 3 + 4) / 36)
    assert words["response_refusal"]["yes"] == pytest.approx((1 + 2 + 5 + 6) / 36)
    assert words["harmful_response"]["yes"] == pytest.approx((1 + 3 + 5 + 7) / 36)
    assert all(sum(of.values()) == pytest.approx(1) for of in words.values())


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("allenai/wildguard", "wildguard"),
        ("meta-llama/Llama-Guard-3-8B", "llama_guard_3"),
        ("meta-llama/Llama-Guard-3-1B", "llama_guard_3"),
        ("meta-llama/Llama-Guard-4-12B", "llama_guard_4"),
        ("Qwen/Qwen3Guard-Gen-0.6B", "qwen3guard"),
        ("Qwen/Qwen3Guard-4B-Gen", "qwen3guard"),
        ("cais/HarmBench-Llama-2-13b-cls", "harmbench"),
        ("/models/strongreject-merged/", "strongreject"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "labels"),
        ("allenai/Llama-3.1-8B-wild", "labels"),
    ],
)
def test_a_name_gives_the_format_away(model, name):
    assert format_of(model, None).name == name
    assert format_of(model, None, "harmbench").name == "harmbench"


def test_a_guard_that_no_name_gives_away_is_not_asked_with_our_rubric():
    template = "... <BEGIN UNSAFE CONTENT CATEGORIES> ..."
    with pytest.raises(JudgeError, match=r"judge\.format"):
        format_of("org/my-guard", template)
    assert format_of("org/my-guard", template, "qwen3guard").name == "qwen3guard"
