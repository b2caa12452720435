"""What differs beside the weights comes first, and no difference in the question is an effect."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from abliterator.checkpoint import Checkpoint
from abliterator.cli import main
from abliterator.comparison import (
    CompareSettings,
    compare,
    diff_weights,
    to_markdown,
)
from abliterator.comparison._beside import Setup, link_with_base_prompting
from abliterator.record import Comparison
from tests.comparison.changes import (
    add_token,
    copied,
    other_template,
    replace_text,
    rewrite,
    shuffle_vocabulary,
)
from tests.comparison.test_comparison import baked
from tests.helpers.windows_rules import windows_rules

PROMPTS = ["which river runs through the old town?", "what do the people there eat?"]


def compared(base: Path, edited: Path, scratch: Path, **settings: Any) -> Comparison:
    scratch.mkdir(exist_ok=True)
    found = compare(
        base,
        edited,
        CompareSettings(
            prompts={"target": PROMPTS, "neutral": PROMPTS},
            max_new_tokens=80,  # enough to be judged
            kl_tokens=4,
            **settings,
        ),
        scratch=scratch,
    )
    return Comparison.model_validate_json(found.model_dump_json())


CONTENT = "{{ messages[0]['content'] }}"
SAME_VOCABULARY = {
    "template": (other_template(f"{CONTENT} The answer is"), "chat_template", "default"),
    "template in the tokenizer's config": (
        lambda f: (
            (f / "chat_template.jinja").unlink(),
            rewrite("tokenizer_config.json", lambda c: c.update(chat_template=CONTENT))(f),
        ),
        "chat_template",
        "default",
    ),
    "a further template": (
        lambda f: (
            (f / "additional_chat_templates").mkdir(),
            (f / "additional_chat_templates" / "tools.jinja").write_text(CONTENT),
        ),
        "chat_template",
        "tools",
    ),
    "normaliser": (
        rewrite("tokenizer.json", lambda c: c.update(normalizer={"type": "Lowercase"})),
        "tokenizer",
        "normalizer",
    ),
    "merges": (
        rewrite("tokenizer.json", lambda c: c["model"].update(merges=c["model"]["merges"][:3])),
        "tokenizer",
        "merges",
    ),
    "a token that is added": (rewrite("tokenizer.json", add_token), "tokenizer", "<|new|>"),
    "a special token that is none": (
        rewrite("tokenizer.json", lambda c: c["added_tokens"][1].update(special=False)),
        "tokenizer",
        "added_tokens",
    ),
    "the begin of text": (
        rewrite("tokenizer_config.json", lambda c: c.update(bos_token="<pad>")),
        "tokenizer",
        "bos_token",
    ),
    "stop tokens of generation_config": (
        rewrite("generation_config.json", lambda c: c.update(eos_token_id=[2, 9])),
        "stop_tokens",
        "ids",
    ),
    "stop tokens of the config": (
        rewrite("config.json", lambda c: c.update(eos_token_id=[2, 9])),
        "stop_tokens",
        "ids",
    ),
    "a penalty": (
        rewrite("generation_config.json", lambda c: c.update(repetition_penalty=1.3)),
        "generation_config",
        "repetition_penalty",
    ),
}


@pytest.mark.parametrize("name", SAME_VOCABULARY)
def test_what_is_asked_differs_and_the_weights_do_not(tiny_folder, tmp_path, name):
    """Both are asked with the base's: nothing is left to differ."""
    change, part, what = SAME_VOCABULARY[name]
    base = tiny_folder("llama")
    edited = copied(base, tmp_path / "edited", change)
    found = compared(base, edited, tmp_path / "scratch")
    assert any((d.part, what in d.name) == (part, True) for d in found.beside), found.beside
    assert (found.asked, found.withheld) == ("as_base", {})
    assert found.divergence.kl.value == 0
    assert found.divergence.top1_agreement.value == 1
    assert found.divergence.perplexity_base == found.divergence.perplexity_edited
    for behaviour in found.behaviour.values():
        assert behaviour.base == behaviour.edited
        assert behaviour.delta.coherence.value == 0
    text = to_markdown(found)
    assert text.index("## Beside the weights") < text.index("## Weights")
    assert what.replace("|", r"\|") in text
    assert "asked with the base's chat template" in text


def truncate_vocabulary(plain: dict) -> None:
    last = max(plain["model"]["vocab"].values())
    vocabulary = plain["model"]["vocab"]
    plain["model"]["vocab"] = {name: token for name, token in vocabulary.items() if token != last}
    plain["model"]["merges"] = plain["model"]["merges"][:-1]


OTHER_VOCABULARY = {
    "shuffled": rewrite("tokenizer.json", shuffle_vocabulary),
    "cut": rewrite("tokenizer.json", truncate_vocabulary),
    "shuffled, with another template": lambda f: (
        OTHER_VOCABULARY["shuffled"](f),
        other_template(CONTENT)(f),
    ),
}


@pytest.mark.parametrize("name", OTHER_VOCABULARY)
def test_other_ids_for_the_same_tokens(tiny_folder, tmp_path, name):
    """Each side's figures are its own, and no difference is made of them."""
    base = tiny_folder("llama")
    edited = copied(base, tmp_path / "edited", OTHER_VOCABULARY[name])
    found = compared(base, edited, tmp_path / "scratch")
    assert found.asked == "apart"
    assert any(d.part == "tokenizer" for d in found.beside)
    assert set(found.withheld) == {"behaviour", "divergence"}
    assert found.divergence is None
    for behaviour in found.behaviour.values():
        assert behaviour.base.coherence is not None
        assert behaviour.edited.coherence is not None
        assert set(behaviour.delta.model_dump().values()) == {None}
        assert (behaviour.p_value, behaviour.smallest_detectable) == ({}, {})
    text = to_markdown(found)
    assert "Not comparable" in text
    assert "| withheld |" in text


CONFIGS = {
    "rope_theta": lambda c: c["rope_parameters"].update(rope_theta=500000.0),
    "rms_norm_eps": lambda c: c.update(rms_norm_eps=1e-2),
    "num_attention_heads": lambda c: c.update(num_attention_heads=2, head_dim=16),
    "hidden_act": lambda c: c.update(hidden_act="gelu"),
    "rope_type": lambda c: c["rope_parameters"].update(rope_type="linear", factor=4.0),
    "architectures": lambda c: c.update(architectures=["LlamaForSequenceClassification"]),
    "unknown_scale": lambda c: c.update(unknown_scale=2.0),
}


@pytest.mark.parametrize("field", CONFIGS)
def test_equal_weights_under_another_config_are_not_identical(tiny_folder, tmp_path, field):
    base = tiny_folder("llama")
    edited = copied(base, tmp_path / "edited", rewrite("config.json", CONFIGS[field]))
    found = compare(base, edited, CompareSettings(), scratch=tmp_path)
    assert any(d.part == "config" and field in d.name for d in found.beside), found.beside
    assert found.weights.verdict == "config"
    assert diff_weights(Checkpoint.open(base), Checkpoint.open(edited)).verdict == "config"
    text = to_markdown(found)
    assert text.index(field) < text.index("## Weights")
    assert "identical" not in text
    assert "No tensor differs." not in text
    assert "weights and config" in text


def test_both_values_of_a_config_are_shown(tiny_folder, tmp_path):
    base = tiny_folder("llama")
    change = rewrite("config.json", CONFIGS["rope_theta"])
    edited = copied(base, tmp_path / "edited", change)
    found = compared(base, edited, tmp_path / "scratch")
    (difference,) = found.beside
    assert (difference.base, difference.edited) == ("10000.0", "500000.0")
    assert found.asked == "alike"
    assert found.divergence.kl.value > 0  # of the config: both are asked the same
    command = CliRunner().invoke(main, ["compare", str(base), str(edited)])
    assert "beside the weights: config, rope_parameters.rope_theta: 10000.0 -> 500000.0" in (
        command.stderr
    )
    assert "| `10000.0` | `500000.0` |" in command.stdout


def test_code_of_the_model_is_compared(tiny_folder, tmp_path):
    base = tiny_folder("qwen")
    edited = copied(
        base, tmp_path / "edited", replace_text("modeling_qwen.py", "import", "# !\nimport")
    )
    found = compare(base, edited, CompareSettings(), scratch=tmp_path)
    assert [(d.part, d.name) for d in found.beside] == [("code", "modeling_qwen.py")]
    assert found.weights.verdict == "config"


NOTHING = {
    "names and versions": rewrite(
        "config.json",
        lambda c: c.update(
            _name_or_path="elsewhere",
            transformers_version="4.0",
            dtype="bfloat16",
            torch_dtype="bfloat16",
            use_cache=False,
            attention_dropout=0.1,
            abliterator={"version": "9"},
        ),
    ),
    "defaults left out": rewrite("config.json", lambda c: c.pop("attention_bias")),
    "the old name of a field": rewrite(
        "config.json", lambda c: c.update(rope_theta=c.pop("rope_parameters")["rope_theta"])
    ),
    "the form of tokenizer.json": rewrite("tokenizer.json", lambda c: None),
    "the template's place": lambda f: (
        rewrite(
            "tokenizer_config.json",
            lambda c: c.update(chat_template=(f / "chat_template.jinja").read_text()),
        )(f),
        (f / "chat_template.jinja").unlink(),
    ),
    "padding": rewrite("tokenizer_config.json", lambda c: c.update(padding_side="right")),
    "a licence": lambda f: (f / "LICENSE").write_text("Be kind."),
    "a processor": lambda f: (f / "preprocessor_config.json").write_text("{}"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_changes_nothing_is_no_difference(tiny_folder, tmp_path, name):
    base = tiny_folder("llama")
    edited = copied(base, tmp_path / "edited", NOTHING[name])
    found = compare(base, edited, CompareSettings(), scratch=tmp_path)
    assert (found.beside, found.asked, found.weights.verdict) == ((), "alike", "identical")
    assert "Nothing differs: chat template" in to_markdown(found)


def test_an_edit_of_ours_differs_in_its_weights_alone(tiny_folder, tmp_path):
    base = tiny_folder("llama", dtype=torch.bfloat16)
    found = compared(base, baked(base, tmp_path / "edit", 1), tmp_path / "scratch")
    assert (found.beside, found.asked) == ((), "alike")
    assert found.weights.verdict == "directional"
    assert found.divergence.kl.value > 0


def test_models_of_another_size_with_one_tokenizer_are_asked_alike(tiny_folder, tmp_path):
    base, other = tiny_folder("llama"), tiny_folder("qwen3")
    found = compared(base, other, tmp_path / "scratch")
    assert found.asked == "alike"
    assert any(d.name == "model_type" for d in found.beside)
    assert found.behaviour["target"].delta.coherence is not None


def test_logits_over_more_tokens_are_not_compared(tiny_folder, tmp_path):
    """As where a token was added: the answers can be compared, the distributions cannot."""

    def widen(folder: Path) -> None:
        rewrite("config.json", lambda c: c.update(vocab_size=400))(folder)
        weights = load_file(folder / "model.safetensors")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = torch.cat([weights[name], torch.zeros(16, weights[name].shape[1])])
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    base = tiny_folder("llama")
    found = compared(base, copied(base, tmp_path / "edited", widen), tmp_path / "scratch")
    assert set(found.withheld) == {"divergence"}
    assert "384 and 400 tokens" in to_markdown(found)
    assert found.behaviour["neutral"].delta.coherence.value == 0


def test_the_folder_with_the_bases_prompting_is_made_without_links_too(tiny_folder, tmp_path):
    """Windows without its developer mode makes no symbolic links."""
    base, folder = tiny_folder("llama"), tmp_path / "rules"
    edited = Path(shutil.copytree(base, folder / "edited"))
    (edited / "chat_template.jinja").write_text("other")
    setups = (Setup(Checkpoint.open(base)), Setup(Checkpoint.open(edited)))
    with windows_rules(folder):
        made = link_with_base_prompting(*setups, folder / "made")
    assert (made / "chat_template.jinja").read_bytes() == (
        base / "chat_template.jinja"
    ).read_bytes()
    for path in edited.glob("*.safetensors"):
        assert not (made / path.name).is_symlink()
        assert (made / path.name).samefile(path)  # on the same disk, a hard link
