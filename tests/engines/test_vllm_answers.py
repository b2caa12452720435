"""Answers of a vLLM server, and of candidates as adapters, against this process; one stands in."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from abliterator.anatomy import anatomy_of
from abliterator.bake import plan_edits
from abliterator.checkpoint import Checkpoint
from abliterator.diagnostics import find_vllm
from abliterator.engines import CompletionClient, ServedEngine, TransformersEngine, WriterEdit
from abliterator.engines._vllm import (
    Served,
    VllmModel,
    _model,
    slots_for,
)
from abliterator.engines._vllm._adapters import baked_digest, edit_digest, planned, write_missing
from abliterator.engines._vllm._http import served_models
from abliterator.engines._vllm._process import Address
from abliterator.errors import ServerError
from abliterator.model import load_model
from abliterator.recipe import STARTED_KEY, Edit, EngineSettings
from abliterator.subspace import orthonormal_basis, random_basis
from tests.helpers.architectures import save
from tests.helpers.vllm_interpreter import vllm_interpreter

# peft 0.21 asks transformers 5.23 for a name that is going
pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="vLLM needs POSIX"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

ASKED = {"max_new_tokens": 6, "batch_size": 4}


class Vllm:
    """An engine with answers of the stand-in, what it noted, and the engine of this process."""

    def __init__(
        self, folder: Path, scratch: Path, *arguments: str, slots: bool = True, toy: bool = True
    ) -> None:
        checkpoint = Checkpoint.open(folder)
        self.plan = plan_edits(checkpoint, anatomy_of(checkpoint.config), Edit())
        self.own = TransformersEngine(load_model(folder, device="cpu", dtype="float32"))
        self.notes: list[str] = []
        arguments = (*arguments, "--stand-in-toy") if toy else arguments
        settings = EngineSettings(kind="vllm", arguments=arguments)
        cache = scratch / "answers.sqlite"
        client = CompletionClient(
            settings.server("base", model="base"), self.own.tokenizer, cache=cache
        )
        self.served = VllmModel(
            find_vllm(vllm_interpreter(scratch)),
            Served(folder, "base", "float32", slots=slots_for(self.plan, 1) if slots else None),
            settings,
            identity="files",
            client=client,
            log=scratch / "vllm.log",
            scratch=scratch / "vllm",
            note=self.notes.append,
        )
        self.engine = ServedEngine(
            folder, self.own.tokenizer, self.served, lambda: self.own, note=self.notes.append
        )

    def basis(self, k: int = 1, seed: int = 0) -> torch.Tensor:
        return random_basis(self.plan.d_model, k, seed=seed)

    def ids(self, count: int = 5) -> list[list[int]]:
        return [[3 + i, 7, 11 + i] for i in range(count)]

    @property
    def address(self) -> Address:
        return Address(self.served.base_url, os.environ[STARTED_KEY])

    @property
    def starts(self) -> int:
        return sum("starts" in note for note in self.notes)


@pytest.fixture
def vllm(tiny_folder, tmp_path) -> Iterator[Vllm]:
    made = Vllm(tiny_folder("llama"), tmp_path)
    yield made
    made.served.close()


def tokens(answers) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in answers]


def test_a_sweep_runs_on_one_start(tiny_folder, tmp_path):
    """With a model behind it: the answers are this process's, under each edit."""
    vllm = Vllm(tiny_folder("llama"), tmp_path, toy=False)
    prompts = vllm.ids()
    base = vllm.own.answers(prompts, **ASKED)
    assert vllm.engine.answers(prompts, **ASKED) == base
    edits = [WriterEdit(vllm.plan, vllm.basis(k, seed)) for k, seed in ((1, 0), (1, 1), (4, 2))]
    with vllm.engine.edited_side_by_side(edits, max_batch_tokens=512) as edited:
        answers = edited.answers(prompts, **ASKED)
        assert edited.log_likelihoods(prompts, [(5,)]).shape == (3, 5, 1)  # of this process
    with vllm.own.edited_side_by_side(edits, max_batch_tokens=512) as own:
        expected = own.answers(prompts, **ASKED)
    assert [tokens(a) for a in answers] == [tokens(a) for a in expected]
    assert any(tokens(a) != tokens(base) for a in answers)
    modules = {edit.writer.module: 0.3 for edit in vllm.plan.edits}
    weak = WriterEdit(vllm.plan, vllm.basis(), modules)
    with vllm.engine.edited(weak), vllm.own.edited(weak):
        assert tokens(vllm.engine.answers(prompts, **ASKED)) == tokens(
            vllm.own.answers(prompts, **ASKED)
        )
    assert vllm.starts == 1
    assert served_models(vllm.address) == ["base"]  # every adapter is unloaded
    vllm.served.close()
    assert not vllm.served.scratch.exists()


def test_answers_are_kept_by_what_gave_them(vllm):
    """A second run starts a second server, at another port, for what it has not alone."""
    prompts = vllm.ids()
    edits = [WriterEdit(vllm.plan, vllm.basis(seed=seed)) for seed in range(2)]
    by_edit = []
    for edit in edits:
        with vllm.engine.edited(edit):
            by_edit.append(vllm.engine.answers(prompts, **ASKED))
    base = vllm.engine.answers(prompts, **ASKED)
    assert len({str(answers) for answers in (*by_edit, base)}) == 3
    vllm.served.close()
    assert vllm.engine.answers(prompts, **ASKED) == base
    assert vllm.starts == 1
    # the first answer that it is asked for ends it
    vllm.served.settings = dying_after(0)
    for edit, answers in zip(edits, by_edit, strict=True):
        with vllm.engine.edited(edit):
            assert vllm.engine.answers(prompts, **ASKED) == answers
    assert vllm.starts == 2


def test_a_larger_rank_starts_it_again(vllm):
    vllm.engine.answers(vllm.ids(), **ASKED)
    with vllm.engine.edited(WriterEdit(vllm.plan, vllm.basis(9))):
        vllm.engine.answers(vllm.ids(), **ASKED)
    assert vllm.starts == 2
    assert vllm.served.served.slots is not None
    assert vllm.served.served.slots.rank == 16
    assert not any("this process" in note for note in vllm.notes)


def test_what_no_adapter_expresses_is_answered_here_and_said(tmp_path):
    vllm = Vllm(save("phi", tmp_path / "phi"), tmp_path)
    edit = WriterEdit(vllm.plan, vllm.basis())
    with vllm.engine.edited(edit):
        answers = vllm.engine.answers(vllm.ids(), **ASKED)
    with vllm.own.edited(edit):
        assert answers == vllm.own.answers(vllm.ids(), **ASKED)
    assert vllm.starts == 0
    assert "bias" in vllm.notes[0]
    assert "from this process" in vllm.notes[1]


def test_what_no_adapter_expresses_is_baked_where_this_process_reads_the_disk(tmp_path):
    """With a model behind it: the answers are this process's; they are kept, the folder is not."""
    vllm = Vllm(save("phi", tmp_path / "phi"), tmp_path, toy=False)
    vllm.served.bakes_edits = lambda: True
    prompts, edit = vllm.ids(), WriterEdit(vllm.plan, vllm.basis())
    for _ in range(2):
        with vllm.engine.edited_side_by_side([edit], max_batch_tokens=512) as edited:
            (answers,) = edited.answers(prompts, **ASKED)
        assert not list(vllm.served.scratch.glob("baked-*"))
    base = vllm.own.answers(prompts, **ASKED)
    with vllm.own.edited(edit):
        assert tokens(answers) == tokens(vllm.own.answers(prompts, **ASKED)) != tokens(base)
    assert vllm.starts == 1
    assert not any("from this process" in note for note in vllm.notes)


def test_base_and_baked_edits_are_served_one_after_another(tmp_path, monkeypatch):
    vllm = Vllm(save("phi", tmp_path / "phi"), tmp_path)
    vllm.served.bakes_edits = lambda: True
    edits = [WriterEdit(vllm.plan, vllm.basis(seed=seed)) for seed in range(2)]
    vllm.engine.answers([[9]], **ASKED)
    with vllm.engine.edited(edits[0]):
        vllm.engine.answers([[9]], **ASKED)
    vllm.engine.answers([[8]], **ASKED)
    log = vllm.served.log.read_text()
    served = [Path(line.split()[1]) for line in log.splitlines() if line.startswith("serves")]
    assert [folder.name.split("-")[0] for folder in served] == ["phi", "baked", "phi"]
    monkeypatch.setattr(_model, "free_bytes", lambda folder: 1000)
    with vllm.engine.edited(edits[1]):
        answers = vllm.engine.answers([[9]], **ASKED)
    with vllm.own.edited(edits[1]):
        assert answers == vllm.own.answers([[9]], **ASKED)
    assert "no room" in vllm.notes[-2]
    assert "from this process" in vllm.notes[-1]
    assert vllm.starts == 3
    vllm.served.close()


def test_what_a_baked_edit_is_kept_by(vllm):
    """Adapters have no other settings; a checkpoint has."""
    edit, plan = WriterEdit(vllm.plan, vllm.basis()), vllm.plan
    nearest = replace(plan, settings=plan.settings.model_copy(update={"rounding": "nearest"}))
    digests = {baked_digest(e) for e in (edit, replace(edit, plan=nearest))}
    assert len(digests) == 2
    assert edit_digest(edit) not in digests


@pytest.mark.parametrize(
    ("argument", "note"),
    [
        ("--stand-in-no-lora", "vLLM refused the adapter of a candidate.*no slots"),
        ("--stand-in-ignores", "vLLM loads an adapter of the modules down_proj, and answers as if"),
    ],
)
def test_an_adapter_that_is_refused_or_left_out_is_said(tiny_folder, tmp_path, argument, note):
    vllm = Vllm(tiny_folder("llama"), tmp_path, argument, "down_proj")
    edit = WriterEdit(vllm.plan, vllm.basis())
    with vllm.engine.edited(edit):
        answers = vllm.engine.answers(vllm.ids(), **ASKED)
    vllm.served.close()
    with vllm.own.edited(edit):
        assert answers == vllm.own.answers(vllm.ids(), **ASKED)
    assert re.search(note, vllm.notes[-2])
    assert "from this process" in vllm.notes[-1]


def test_a_model_that_takes_no_adapters_is_served_without(vllm, monkeypatch):
    """As vLLM has it of some architectures, once it started."""
    start = _model.vllm_server

    def refusing(install, served, *arguments, **options):
        if served.slots is not None:
            raise ServerError("Its log says: ValueError: Foo does not support LoRA yet.")
        return start(install, served, *arguments, **options)

    monkeypatch.setattr(_model, "vllm_server", refusing)
    edit = WriterEdit(vllm.plan, vllm.basis())
    with vllm.engine.edited(edit):
        answers = vllm.engine.answers(vllm.ids(), **ASKED)
    with vllm.own.edited(edit):
        assert answers == vllm.own.answers(vllm.ids(), **ASKED)
    assert vllm.engine.answers(vllm.ids(), **ASKED) != answers
    assert [note for note in vllm.notes if "takes no adapters" in note]
    assert vllm.starts == 1


def test_one_that_dies_while_it_answers_is_named_and_what_it_answered_is_kept(
    tiny_folder, tmp_path
):
    vllm = Vllm(tiny_folder("llama"), tmp_path, "--stand-in-dies-after", "4", slots=False)
    with pytest.raises(ServerError, match=r"ended while it served.*OutOfMemoryError.*kept"):
        vllm.engine.answers(vllm.ids(8), **ASKED)
    vllm.served.close()
    vllm.served.settings = dying_after(7)
    assert len(vllm.engine.answers(vllm.ids(8), **ASKED)) == 8
    vllm.served.close()


def dying_after(answers: int) -> EngineSettings:
    arguments = ("--stand-in-dies-after", str(answers), "--stand-in-toy")
    return EngineSettings(kind="vllm", arguments=arguments)


def test_by_peft_an_adapter_is_the_hook(tiny_folder, tmp_path):
    """Unmerged, as an engine applies it: logits of both, at strengths of each module."""
    folder = tiny_folder("llama")
    checkpoint = Checkpoint.open(folder)
    plan = plan_edits(checkpoint, anatomy_of(checkpoint.config), Edit())
    strengths = {e.writer.module: 0.4 + 0.2 * i for i, e in enumerate(plan.edits)}
    basis = orthonormal_basis(
        torch.randn(3, plan.d_model, generator=torch.Generator().manual_seed(1))
    )
    edits = [WriterEdit(plan, basis), WriterEdit(plan, basis[:, :1], strengths)]
    assert len({edit_digest(edit) for edit in edits}) == 2
    assert [e.strength for e in planned(edits[1]).edits] == list(strengths.values())
    write_missing(checkpoint, {tmp_path / f"{i}": edit for i, edit in enumerate(edits)})
    loaded = load_model(folder, device="cpu", dtype="float32")
    ids = torch.tensor([[3, 7, 11, 2, 9]])
    for i, edit in enumerate(edits):
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        adapted = PeftModel.from_pretrained(plain, tmp_path / f"{i}")
        with TransformersEngine(loaded).edited(edit), torch.inference_mode():
            torch.testing.assert_close(
                adapted(ids).logits, loaded.model(ids).logits, rtol=1e-5, atol=2e-6
            )
