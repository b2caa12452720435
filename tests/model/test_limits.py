"""Prompts against what a model can read: refused before anything runs, by set and number."""

from __future__ import annotations

import copy
import json
import time

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoConfig

from abliterator.capture import capture
from abliterator.cli import main
from abliterator.engines import AnswerPath, TransformersEngine
from abliterator.errors import CheckpointError, PromptError
from abliterator.evaluation import neutral_text, text_perplexity
from abliterator.model import (
    Limits,
    LoadedModel,
    context_limit,
    limits_of,
    load_model,
    render_prompts,
    stored_limits,
)
from abliterator.pipeline import Options, open_chat
from abliterator.prompts import load_prompts
from abliterator.recipe import Source
from tests.helpers import architectures

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"model_type": "llama", "max_position_embeddings": 256}, 256),
        ({"model_type": "gpt2", "n_positions": 128}, 128),
        ({"model_type": "codegen", "n_positions": 128}, 128),  # n_ctx is left at 2048
        ({"model_type": "mpt", "max_seq_len": 96}, 96),
        ({"model_type": "ctrl", "n_positions": 99}, 99),
        # a window bounds what is attended, not what is read
        ({"model_type": "mistral", "max_position_embeddings": 512, "sliding_window": 16}, 512),
        ({"model_type": "falcon", "alibi": True, "max_position_embeddings": 64}, None),
        ({"model_type": "bloom", "seq_length": 64}, None),
        ({"model_type": "mamba"}, None),
        ({"model_type": "rwkv", "context_length": 64}, None),
        # the length that a scaling reaches, whichever of the two the config gives
        ({"model_type": "qwen2", "max_position_embeddings": 100, "rope_parameters": YARN}, 400),
        (
            {
                "model_type": "qwen2",
                "max_position_embeddings": 800,
                "rope_parameters": {**YARN, "original_max_position_embeddings": 100},
            },
            800,
        ),
        ({"model_type": "gemma3", "text_config": {"max_position_embeddings": 77}}, 77),
    ],
)
def test_the_limit_is_the_configs(config, limit):
    assert context_limit(AutoConfig.for_model(**config)) == limit


def test_a_number_that_is_none_is_no_limit():
    config = AutoConfig.for_model("llama")
    for nonsense in (None, "many", -1, 0, True, [4]):
        object.__setattr__(config, "max_position_embeddings", nonsense)
        assert context_limit(config) is None


def test_stored_and_loaded_agree(tiny_loaded):
    loaded = tiny_loaded()
    assert limits_of(loaded) == stored_limits(loaded.folder) == Limits(256, 384)


def test_a_prompt_is_refused_by_set_and_number_and_not_quoted(tiny_loaded):
    loaded = tiny_loaded()

    def rendered(*prompts, limits=None, **options):
        limits = limits or limits_of(loaded)
        return render_prompts(loaded.tokenizer, prompts, limits, name="target", **options)

    assert len(rendered("which river", "the old town")) == 2
    with pytest.raises(
        PromptError, match=r"Prompt 2 of the set 'target' has [\d,]+ tokens"
    ) as info:
        rendered("which river", "zq" * 300)
    assert "zq" not in str(info.value)
    assert "256" in str(info.value)
    length = len(rendered("which river")[0])
    assert rendered("which river", max_new_tokens=256 - length)
    with pytest.raises(PromptError, match=f"ask for {256 - length} tokens of an answer or fewer"):
        rendered("which river", max_new_tokens=257 - length)
    with pytest.raises(CheckpointError, match=r"the model's embedding has 300 rows: its tokenizer"):
        rendered("which river", limits=Limits(256, 300))
    assert rendered("zq" * 300, limits=Limits())


def test_ten_megabytes_are_refused_at_once(tiny_loaded, tmp_path):
    loaded, start = tiny_loaded(), time.perf_counter()
    with pytest.raises(PromptError, match="10,000,000 characters"):
        render_prompts(loaded.tokenizer, ["a" * 10_000_000], limits_of(loaded), name="target")
    (tmp_path / "p.txt").write_text("short\n" + "a" * 10_000_000)
    with pytest.raises(PromptError, match=r"p.txt, line 2: 10,000,000 characters"):
        load_prompts("target", Source(path=tmp_path / "p.txt"))
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neo", "mpt", "llama"])
def test_ids_that_are_run_are_checked_wherever_they_run(name, tmp_path, tiny_tokenizer):
    """Learned positions raised an IndexError, rotary ones went on without a word."""
    architectures.save(name, tmp_path)
    model = type(architectures.build(name)).from_pretrained(tmp_path).eval()
    loaded = LoadedModel(model, tiny_tokenizer, tmp_path, "cpu")
    engine = TransformersEngine(loaded)
    limit = engine.limits.context
    for prompt, error in (([5] * (limit + 1), PromptError), ([5, 96], CheckpointError)):
        with pytest.raises(error):
            engine.answers([prompt], max_new_tokens=1, batch_size=1, stop_ids=())
        with pytest.raises(error):
            capture(engine, [prompt])
        with pytest.raises(error):
            list(engine.logits([AnswerPath(tuple(prompt), 1)], max_batch_tokens=64))
    with pytest.raises(PromptError, match="an answer of 3 goes beyond"):
        engine.answers([[5] * (limit - 2)], max_new_tokens=3, batch_size=1, stop_ids=())
    full = engine.answers([[5] * (limit - 2)], max_new_tokens=2, batch_size=1, stop_ids=())
    assert len(full[0].token_ids) == 2


def test_the_fixed_text_is_read_in_parts_by_a_model_of_few_positions(tiny_tokenizer, tmp_path):
    model = architectures.build("gpt2")
    config = copy.deepcopy(model.config)
    config.vocab_size = 384
    model = type(model)(config).eval()
    loaded = LoadedModel(model, tiny_tokenizer, tmp_path, "cpu")
    assert text_perplexity(TransformersEngine(loaded), neutral_text()[:1]).value > 1


def recipe(folder, tmp_path, **last):
    for name in ("target", "neutral"):
        prompts = [f"{name}: which river runs through town {i}?" for i in range(12)]
        (tmp_path / f"{name}.txt").write_text("\n".join([*prompts, *last.get(name, [])]))
    path = tmp_path / "r.yaml"
    path.write_text(
        f"model: {folder}\nlayers: [2]\nk: 1\nrollouts: {{max_new_tokens: {last['tokens']}}}\n"
        "prompts: {target: {path: target.txt}, neutral: {path: neutral.txt}}\n"
    )
    return path


@pytest.mark.parametrize("case", ["prompt", "answer", "ids"])
def test_a_build_stops_before_weights_are_loaded(case, writable, tmp_path, monkeypatch):
    tokens, last = 3, {}
    if case == "prompt":  # wherever the set is split, it is in extraction or in evaluation
        last = {"neutral": ["zq" * 400]}
    elif case == "answer":
        tokens = 250
    else:
        config = json.loads((writable / "config.json").read_text())
        (writable / "config.json").write_text(json.dumps({**config, "vocab_size": 60}))
    from abliterator import model

    monkeypatch.setattr(model, "load_model", lambda *args, **kwargs: 1 / 0)
    path = recipe(writable, tmp_path, tokens=tokens, **last)
    done = CliRunner().invoke(main, ["build", str(path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1, done.exception
    said = {"prompt": "PromptError", "answer": "an answer of 250", "ids": "has 60 rows"}[case]
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_conversation_ends_where_the_context_does(tiny_folder):
    session = open_chat(
        str(tiny_folder()), sides=("edited",), max_new_tokens=None, options=Options(device="cpu")
    )
    pieces: list[str] = []
    session.answer("edited", "which river", [], pieces.append)  # 256 tokens would not fit
    with pytest.raises(PromptError, match="set 'chat'"):
        session.answer("edited", "which river", [("the old town", "zq" * 300)], pieces.append)


def test_a_tokenizer_larger_than_the_model_still_loads(tiny_folder, tiny_tokenizer, tmp_path):
    architectures.save("llama", tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, device="cpu", dtype="float32")
    with pytest.raises(CheckpointError, match="96 rows"):
        TransformersEngine(loaded).answers([[200]], max_new_tokens=1, batch_size=1, stop_ids=())
    assert torch.isfinite(loaded.model.lm_head.weight).all()
