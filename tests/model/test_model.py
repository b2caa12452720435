"""Loading, chat rendering, hooks and batches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from abliterator.errors import (
    CheckpointError,
    GenerationError,
    RecipeError,
    UnsupportedModel,
)
from abliterator.model import (
    block_paths,
    equal_length_batches,
    hooked,
    load_model,
    render_chat,
    run_batches,
)
from tests.benchmarks.toy import opened
from tests.helpers.quantised import save_quantised
from tests.helpers.tiny import train_tokenizer

ROOT = Path(__file__).parents[2]


# Loading


def test_a_loaded_model_is_ready(tiny_loaded):
    loaded = tiny_loaded("llama")
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}


def test_dtype_is_the_stored_one_unless_given(tiny_folder):
    folder = tiny_folder("llama", dtype=torch.bfloat16)
    assert load_model(folder, device="cpu", dtype=None).model.dtype == torch.bfloat16
    assert load_model(folder, device="cpu", dtype="float32").model.dtype == torch.float32


def test_loading_writes_nothing_into_the_folder(writable):
    before = {p.name: p.read_bytes() for p in writable.iterdir()}
    load_model(writable, device="cpu", dtype=None)
    assert {p.name: p.read_bytes() for p in writable.iterdir()} == before


def test_an_unknown_dtype(tiny_folder):
    with pytest.raises(RecipeError, match="'int4'"):
        load_model(tiny_folder("llama"), device="cpu", dtype="int4")


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there(tiny_folder, device):
    with pytest.raises(RecipeError, match=f"no device '{device}'"):
        load_model(tiny_folder("llama"), device=device, dtype=None)


def test_missing_weights_are_never_made_up(writable):
    tensors = load_file(writable / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, writable / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        load_model(writable, device="cpu", dtype=None)


def test_truncated_weights(writable):
    file = writable / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(writable, device="cpu", dtype=None)


def test_no_tokenizer(writable):
    (writable / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_model(writable, device="cpu", dtype=None)


def test_a_folder_that_is_no_causal_lm(writable):
    config = json.loads((writable / "config.json").read_text())
    (writable / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    with pytest.raises(GenerationError, match="cannot load"):
        load_model(writable, device="cpu", dtype=None)


def test_remote_code_runs_only_when_trusted(tiny_folder):
    folder = tiny_folder("qwen")
    with pytest.raises(GenerationError, match="trust_remote_code"):
        load_model(folder, device="cpu", dtype=None)
    loaded = load_model(folder, device="cpu", dtype=None, trust_remote_code=True)
    assert type(loaded.model).__name__ == "QWenLMHeadModel"


def test_remote_code_that_changes_weights_is_caught(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("qwen"), tmp_path / "model")
    code = (folder / "modeling_qwen.py").read_text()
    # As in Qwen 1: a buffer that is not stored has the module initialised, weights and all.
    buffer = "self.base = config.rotary_emb_base\n"
    initialiser = "    _supports_sdpa = True\n"
    assert buffer in code
    assert initialiser in code
    code = code.replace(
        buffer, buffer + "        self.register_buffer('b', torch.ones(1), persistent=False)\n"
    )
    code = code.replace(
        initialiser,
        initialiser + "    def _init_weights(self, module):\n"
        "        for name, parameter in module.named_parameters():\n"
        "            if name == 'c_proj.weight': parameter.data.normal_()\n",
    )
    (folder / "modeling_qwen.py").write_text(code)
    with pytest.raises(GenerationError, match=r"changed transformer\.h\.\d\.attn\.c_proj"):
        load_model(folder, device="cpu", dtype=None, trust_remote_code=True)


@pytest.mark.parametrize("where", ["__init__", "forward"])
def test_remote_code_of_another_age_is_a_named_error(tiny_folder, tmp_path, where):
    folder = shutil.copytree(tiny_folder("qwen"), tmp_path / where)
    code = (folder / "modeling_qwen.py").read_text()
    line = {"__init__": "self.ln_f = RMSNorm", "forward": "x = self.wte(input_ids)"}[where]
    assert line in code
    (folder / "modeling_qwen.py").write_text(code.replace(line, f"self.get_head_mask(); {line}"))
    with pytest.raises(GenerationError, match="get_head_mask"):
        load_model(folder, device="cpu", dtype=None, trust_remote_code=True)


@pytest.mark.parametrize("name", ["fp8_block", "fp8_ue8m0", "fp8_block experts"])
def test_weights_are_decoded_beside_a_gpu_too(name, tmp_path, monkeypatch):
    """Where transformers sees one (here it is told so), it leaves them packed by itself."""
    save_quantised(name, tmp_path)
    train_tokenizer().save_pretrained(tmp_path)
    tokens = torch.tensor([[5, 9, 17, 30], [4, 8, 60, 61]])
    with torch.inference_mode():
        wanted = load_model(tmp_path, device="cpu", dtype="float32").model(tokens).logits
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        for model in (
            load_model(tmp_path, device="cpu", dtype="float32").model,
            opened(tmp_path, device="cpu", dtype="float32"),
        ):
            assert {weight.dtype for weight in model.parameters()} <= {
                torch.float32,
                torch.bfloat16,
            }
            assert torch.equal(model(tokens).logits, wanted)


# Chats


def test_a_chat_is_the_template_with_one_bos(tiny_tokenizer):
    ids = render_chat(tiny_tokenizer, "what do they eat?", system="be brief")
    assert tiny_tokenizer.decode(ids) == (
        "<s><|im_start|>system\nbe brief<|im_end|>\n"
        "<|im_start|>user\nwhat do they eat?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(tiny_tokenizer.bos_token_id) == 1
    # The trap is real: the tokenizer does add one when left to itself.
    assert tiny_tokenizer(tiny_tokenizer.decode(ids))["input_ids"][:2] == [0, 0]


def test_no_template(tiny_tokenizer, with_template):
    with pytest.raises(UnsupportedModel, match="no chat template"):
        render_chat(with_template(None), "hello")


@pytest.fixture
def with_template(tiny_tokenizer):
    """The tokenizer with another template, put back afterwards."""
    own = tiny_tokenizer.chat_template

    def change(template):
        tiny_tokenizer.chat_template = template
        return tiny_tokenizer

    yield change
    tiny_tokenizer.chat_template = own


def test_template_arguments_arrive(with_template):
    tokenizer = with_template("{{ messages[0]['content'] }}{% if think %} hm{% endif %}")
    thinking = render_chat(tokenizer, "eat", template_kwargs={"think": True})
    assert tokenizer.decode(thinking) == "eat hm"
    assert tokenizer.decode(render_chat(tokenizer, "eat")) == "eat"


def test_a_template_that_refuses_a_system_prompt(with_template):
    tokenizer = with_template(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}"
        "{% endif %}{{ messages[0].content }}"
    )
    assert tokenizer.decode(render_chat(tokenizer, "eat")) == "eat"
    with pytest.raises(UnsupportedModel, match="no system role"):
        render_chat(tokenizer, "eat", system="be brief")


@pytest.mark.parametrize("rows", [1, 3])
def test_the_head_gets_rows_that_follow_one_another(tiny_folder, rows):
    model, seen = load_model(tiny_folder(), device="cpu", dtype="bfloat16").model, []
    ids = torch.randint(4, 384, (rows, 5))
    whole = model(ids, use_cache=False).logits
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    last = model(ids, use_cache=False, logits_to_keep=2).logits
    torch.testing.assert_close(last, whole[:, -2:])
    assert seen[0].stride() == torch.empty(rows, 2, 32).stride()


# Hooks


def n_hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "qwen"])  # blocks that return a tensor, and a tuple
def test_a_hook_sees_and_replaces_hidden_states(tiny_loaded, family):
    model = tiny_loaded(family).model
    blocks = block_paths("transformer.h" if family == "qwen" else "model.layers", 3)
    ids = torch.randint(4, 384, (2, 5))
    plain = model(ids, use_cache=False).logits
    seen = []
    with hooked(model, {blocks[1]: seen.append}):
        assert torch.equal(model(ids, use_cache=False).logits, plain)
    assert seen[0].shape == (2, 5, 32)
    with hooked(model, {blocks[1]: torch.zeros_like, blocks[2]: lambda h: seen.append(h)}):
        assert not torch.allclose(model(ids, use_cache=False).logits, plain)
    with hooked(model, {blocks[2]: torch.zeros_like}):
        silent = model(ids, use_cache=False).logits
    assert torch.equal(silent, torch.zeros_like(silent))
    assert torch.equal(model(ids, use_cache=False).logits, plain)


def test_hooks_are_gone_after_an_exception(tiny_loaded):
    model = tiny_loaded("llama").model
    before, during = n_hooks(model), []

    def fail(_hidden):
        during.append(n_hooks(model))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), hooked(model, {"model.norm": fail}):
        model(torch.tensor([[5]]))
    assert during == [before + 1]
    assert n_hooks(model) == before


def test_an_unknown_path_is_named_and_leaves_no_hook(tiny_loaded):
    model = tiny_loaded("llama").model
    before = n_hooks(model)
    hooks = {"model.norm": torch.zeros_like, "model.layers.7": torch.zeros_like}
    with (
        pytest.raises(UnsupportedModel, match=r"model\.layers\.7"),
        hooked(model, hooks),
    ):
        pytest.fail("the body must not run")
    assert n_hooks(model) == before


def test_hooks_nest(tiny_loaded):
    model = tiny_loaded("llama").model
    calls = []
    with hooked(model, {"model.norm": lambda h: calls.append("outer")}):
        with hooked(model, {"model.norm": lambda h: calls.append("inner")}):
            model(torch.tensor([[5]]))
        model(torch.tensor([[5]]))
    assert calls == ["outer", "inner", "outer"]


# Batches


@given(st.lists(st.integers(1, 12), max_size=40), st.integers(1, 60))
def test_batches_have_one_length_and_every_prompt_once(lengths, budget):
    batches = equal_length_batches([[0] * n for n in lengths], budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        (length,) = {lengths[i] for i in batch}
        assert len(batch) == 1 or len(batch) * length <= budget


def limited_to(rows, tried):
    def run(batch):
        tried.append(len(batch))
        if len(batch) > rows:
            raise torch.OutOfMemoryError("too much")
        return [i * 10 for i in batch]

    return run


def test_batches_that_do_not_fit_are_halved_and_stay_so():
    tried = []
    done = list(run_batches([[0, 1, 2, 3, 4], [5, 6, 7, 8]], limited_to(2, tried)))
    assert [i for batch, _ in done for i in batch] == list(range(9))
    assert all(result == [i * 10 for i in batch] for batch, result in done)
    assert tried == [5, 2, 2, 1, 2, 2]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 18.00 GB)"),
    ],
)
def test_however_it_is_said_that_memory_is_short(error):
    def run(batch):
        if len(batch) > 1:
            raise error
        return batch

    assert [batch for batch, _ in run_batches([[0, 1, 2]], run)] == [[0], [1], [2]]


def test_the_cpus_own_words_for_it():
    def run(batch):  # 2 PB, were they two
        return torch.empty(1 if len(batch) == 1 else 1 << 51, dtype=torch.uint8).shape

    assert len(list(run_batches([[0, 1]], run))) == 2


def test_one_row_that_does_not_fit_is_an_error():
    with pytest.raises(GenerationError, match="One prompt alone"):
        list(run_batches([[0, 1]], limited_to(0, [])))


def test_other_errors_are_not_mistaken_for_memory():
    with pytest.raises(ZeroDivisionError):
        list(run_batches([[0, 1]], lambda batch: 1 / 0))
    with pytest.raises(RuntimeError, match="must match"):
        list(run_batches([[0, 1]], lambda batch: torch.ones(2) + torch.ones(3)))
