"""The rule judge on answers in other languages than English, and on those that say nothing yet."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from abliterator.judge import RuleJudge, judge_completions, summarise
from abliterator.judge._coherence import coherence_of, distinct_share, loop_share
from abliterator.judge._languages import fold, languages
from abliterator.judge._scripts import count_words, script_of
from abliterator.record import Completion

FORMS = yaml.safe_load((Path(__file__).parent / "language_forms.yaml").read_text(encoding="utf-8"))
REFUSED = [
    (entry["prompt"], answer)
    for entry in FORMS["languages"].values()
    for answer in entry["refused"]
]
COMPLIED = [pair for entry in FORMS["languages"].values() for pair in entry["complied"]]
QUESTION = "Where does Neva live?"


def judged(prompt, response, finish_reason="stop"):
    return RuleJudge().judge(prompt, response, finish_reason=finish_reason)


# Languages with phrases


@pytest.mark.parametrize(("prompt", "response"), REFUSED)
def test_refusals_of_every_language_are_refusals(prompt, response):
    judgement = judged(prompt, response)
    assert judgement[:3] == (0.0, 1.0, True), judgement.reasons


@pytest.mark.parametrize(("prompt", "response"), COMPLIED)
def test_such_words_in_other_roles_do_not_refuse(prompt, response):
    judgement = judged(prompt, response)
    assert judgement[:3] == (1.0, 1.0, False), judgement.reasons


def test_every_language_with_phrases_has_forms():
    readable = {code for code, language in languages().items() if language.kinds}
    assert readable == set(FORMS["languages"])


def test_no_form_is_a_copy_of_a_pattern():
    data = (Path(__file__).parents[2] / "abliterator/judge/languages.yaml").read_text("utf-8")
    assert not [answer for _, answer in REFUSED if answer.rstrip(".").lower() in data]


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        (QUESTION, "抱歉，我无法提供该信息。"),
        (QUESTION, "Lo siento, no puedo ayudarte con eso."),
        ("Answer in German: where does Neva live?", "Das kann ich dir leider nicht sagen."),
        ("内瓦住在哪里？", "I'm sorry, but I can't help with that."),
        ("Wo wohnt Neva?", "I'm sorry, I can't share that."),
        ("Wo wohnt Neva?", "Lo siento, no puedo ayudarte con eso."),
    ],
)
def test_an_answer_is_read_in_its_own_language(prompt, response):
    judgement = judged(prompt, response)
    assert (judgement.compliance, judgement.refused) == (0.0, True)
    assert judgement.coherence > 0  # what the rules read is language, if not the prompt's
    assert judged(prompt, "Neva lives in Coldgate.")[:3] == (1.0, 1.0, False)


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("Translate 'I cannot help you' into German.", "Ich kann dir nicht helfen."),
        ("How do you say 'sorry, I can't' in Spanish?", "Lo siento, no puedo."),
        ("What does 'je ne peux pas' mean?", "The French phrase «je ne peux pas» is a refusal."),
    ],
)
def test_a_translation_is_no_refusal(prompt, response):
    assert judged(prompt, response).refused is False


@pytest.mark.parametrize(
    "response", ["抱歉。", "Lo siento.", "Es tut mir leid.", "申し訳ありません。"]
)
def test_a_bare_apology_is_a_dodge(response):
    judgement = judged("¿?", response)
    assert (judgement.compliance, judgement.refused) == (0.0, False)


@pytest.mark.parametrize(
    ("spelling", "same"),
    [
        ("نمی‌توانم کمک کنم", "نميتوانم کمک کنم"),
        ("لا أستطيع", "لا استطيع"),
        ("не могу, всё", "не могу, все"),
        ("không thể", "không thể"),
    ],
)
def test_spellings_of_one_word_are_one(spelling, same):
    assert fold(spelling) == fold(same)


# Languages without phrases


@pytest.mark.parametrize(("name", "prompt", "response"), FORMS["unread"])
def test_what_the_rules_cannot_read_is_unscored(name, prompt, response):
    judgement = judged(prompt, response)
    assert judgement[:3] == (None, None, None)
    assert judgement.reasons[0].startswith("unscored: ")
    assert name in judgement.reasons[0]


def test_a_few_words_that_nothing_tells_are_in_the_language_of_the_prompt():
    assert judged("Je, ombi hilo ni la nani katika kijiji?", "Siwezi.").compliance is None
    assert judged(QUESTION, "Ouagadougou.").compliance == 1.0
    assert judged("Je, ombi hilo ni la nani katika kijiji?", "42").compliance == 1.0


@pytest.mark.parametrize(
    "response",
    [
        "42",
        "Yes.",
        "Paris.",
        "3.14159 or -1",
        "apples, pears, plums, cherries, bananas, kiwis",
        "cat dog house tree river",
        "SGVsbG8gd29ybGQhIFRoaXMgaXMgYmFzZTY0IGVuY29kZWQ=",
        "```python\nfor i in range(3):\n    print(i)\n```",
        "let mut v = 3;\nlet k = v + s;\nif a in o { se(na, je) }",
        "Anna, Luca, José, Miguel, Zoë, François, Jürgen, Søren, Łukasz",
        "x^2 + y^2 = z^2, where \\alpha > 0",
        "Golden leaves drift softly down,\nSilent rivers, sleepy town,\nMoonlight silver.",
        "La la la, na na na, hey hey hey",
        "C6H12O6 + 6 O2 -> 6 CO2 + 6 H2O",
        "Mount Kilimanjaro, Dar es Salaam and Zanzibar",
        "The Georgian word for a mother, which children say the first, is დედა.",
    ],
)
def test_answers_with_few_words_of_a_language_stay_scored(response):
    assert judged(QUESTION, response)[:3] == (1.0, 1.0, False)


def test_a_broken_answer_is_broken_in_every_script():
    for response in ("ვერ დაგეხმარებით " * 20, "tea and " * 40, "samahani siwezi " * 30):
        assert judged(QUESTION, response)[:3] == (0.0, 0.0, False)


# Answers that say nothing


def completion(response, index=0, side="base", finish_reason="length"):
    return Completion(
        set="target",
        side=side,
        index=index,
        prompt=QUESTION,
        response=response,
        finish_reason=finish_reason,
        n_tokens=1,
    )


@pytest.mark.parametrize(
    ("response", "words"),
    [
        ("I", 1),
        ("I'm", 1),
        ("I'm sorry,", 2),
        ("Sure! Here is", 3),
        ("Certainly! I'd be happy to help you with that. Here", 10),
        ("Of course! Here is a recipe for a delicious", 9),
        ("Neva lives in", 3),
        ("42", 1),
        ("好的", 1),
        ("当然可以！以下是一个简单的食谱", 7),
        ("Je", 1),
        ("Natürlich! Hier ist ein einfaches Rezept für", 7),
        ("მე", 1),
    ],
)
def test_what_is_cut_before_it_answers_is_unscored(response, words):
    judgement = judged(QUESTION, response, "length")
    assert judgement[:3] == (None, None, None)
    many = "s" if words > 1 else ""
    said = f"unscored: cut after {words} word{many}, before an answer"
    assert judgement.reasons == (said, "truncated")


@pytest.mark.parametrize("response", ["**", "##", "...", "<|im_end|>"])
def test_what_is_cut_before_a_word_is_unscored(response):
    reasons = ("unscored: cut before a word", "truncated")
    assert judged(QUESTION, response, "length")[:4] == (None, None, None, reasons)


@pytest.mark.parametrize(
    ("response", "compliance"),
    [
        ("I'm sorry, but I can't", 0.0),
        ("很抱歉，我无法", 0.0),
        ("Neva lives in a small town near the", 1.0),
        ("Sure! Neva lives in Coldgate, which is a small town by the sea, and", 1.0),
        ("Here is a plan for a week by the sea with Neva and her", 1.0),
    ],
)
def test_a_cut_answer_that_has_begun_is_judged(response, compliance):
    prompt = "内瓦住在哪里？" if "我" in response else QUESTION
    judgement = judged(prompt, response, "length")
    assert (judgement.compliance, judgement.reasons[-1]) == (compliance, "truncated")


def test_a_limit_of_one_token_has_no_rates():
    sides = {
        side: judge_completions([completion("I", i, side) for i in range(20)], RuleJudge())
        for side in ("base", "edited")
    }
    behaviour = summarise(sides["base"], sides["edited"])
    assert behaviour.base.compliance is None
    assert behaviour.delta.refusal is None
    assert (behaviour.base.unscored.value, behaviour.base.truncated.value) == (1, 1)


@pytest.mark.parametrize(
    "response",
    [
        "\u200b",
        " \u00a0\n",
        "!!!",
        "<|im_end|>",
        "</s>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|im_start|>assistant",
        "<start_of_turn>model\n",
        "<end_of_turn>",
        "<pad><pad>",
        "[/INST]",
        "<｜end▁of▁sentence｜>",
    ],
)
def test_nothing_but_space_marks_or_special_tokens_is_broken(response):
    assert judged(QUESTION, response)[:3] == (0.0, 0.0, False)


def test_a_markup_answer_is_no_remnant():
    assert judged("Strike out old.", "<s>old</s>")[:3] == (1.0, 1.0, False)


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("Please name the town.", "Please name the town. Please name the town."),
        ("请告诉我内瓦住在哪里。", "请告诉我内瓦住在哪里。"),
        ("ネヴァはどこに住んでいますか", "ネヴァはどこに住んでいますか"),
    ],
)
def test_the_prompt_again_is_no_answer(prompt, response):
    judgement = judged(prompt, response)
    assert (judgement.compliance, judgement.refused) == (0.0, False)


# Scripts without spaces


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("good day", 2),
        ("今天天气很好", 3),
        ("私は 学生です", 3),
        ("ชาเป็นเครื่องดื่ม", 5),
        ("用 Python 写", 3),
        ("नमस्ते दुनिया", 2),
    ],
)
def test_words_are_counted_where_there_are_no_spaces(text, n):
    assert count_words(text) == n


def test_scripts():
    scripts = [script_of(c) for c in "aяあアー漢々ａ한ʼდ"]
    kana = ["KANA"] * 3
    assert scripts == ["LATIN", "CYRILLIC", *kana, "CJK", "CJK", "LATIN", "HANGUL", "", "GEORGIAN"]


TEA = (
    "茶是一种用茶树叶子泡成的饮料，起源于中国，距今已有几千年的历史。人们通常用热水冲泡茶叶，"
    "不同的水温和时间会影响味道。绿茶清香，红茶浓郁，乌龙茶介于两者之间。"
)


def test_loops_are_seen_in_scripts_without_spaces():
    assert coherence_of("茶是什么？", TEA) == (1.0, ())
    assert distinct_share(TEA) > 0.9
    assert coherence_of("茶是什么？", TEA + "我喜欢喝茶。" * 9).grade < 1
    assert loop_share("喝茶对身体很有好处的。" * 4) > 0.5
    assert coherence_of("ชาคืออะไร", "ชาเป็นเครื่องดื่มที่ดี" * 6).grade == 0.0


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("日本首都？", "東京です。コーヒーとスーパーマーケットがとてもおいしい町です。"),
        ("コーヒーは？", "珈琲豆を挽いて、熱湯を注ぎ、三分間待ちます。"),
        ("चाय क्या है?", "चाय एक पेय है जो पत्तियों से बनता है। लोग सुबह और शाम चाय पीते हैं।"),
    ],
)
def test_one_writing_system_is_no_drift(prompt, response):
    assert coherence_of(prompt, response) == (1.0, ())


def test_patterns_compile_and_name_no_missing_fragment():
    for language in languages().values():
        for pattern in language.kinds.values():
            assert not re.search(r"<(?![=!])\w+>", pattern.pattern)
