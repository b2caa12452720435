"""What each way of storing an edit in a quantised format does to a model's behaviour.

    abliterator directions recipes/smollm2.yaml --set model=MODEL --out WORK
    python perf/storage_behaviour.py MODEL WORK/work/directions.safetensors [--n 72]

MODEL is a bfloat16 checkpoint of Llama's shape (scripts/smollm2/make_model.py makes one). It is
stored in each format, edited as recipes/smollm2.yaml says by plain rounding, by compensated
rounding (`keep`) and as bfloat16 (`dequantize`), and asked beside its quantised base and the exact
edit: hooks in float32 on that base. All weights are decoded to float32, so that nothing but what
was stored differs. Declines are the rule judge's, of 40 tokens; KL is of the first token after
ordinary prompts, from the base (the base's own is from the unquantised model) and from the exact
edit; brackets are 95 % intervals.

MXFP4 is stored here as gpt-oss does it: the MLP in MXFP4, attention in bfloat16. No model of that
shape is small enough to answer anything on a CPU, so SmolLM2's matrices stand in for experts': they
are rounded to MXFP4 numbers, which bfloat16 holds exactly, and their edit goes through the layout
and the code that edits gpt-oss; only the folder around them is a Llama's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from abliterator.anatomy import anatomy_of
from abliterator.bake import EditPlan, bake, plan_edits
from abliterator.bake._stored import edit_stored
from abliterator.bake._write import removal_of
from abliterator.checkpoint import Checkpoint
from abliterator.directions import load_subspace
from abliterator.engines import AnswerPath, TransformersEngine, WriterEdit
from abliterator.evaluation import kl_divergence
from abliterator.formats import mxfp4_numbers, mxfp4_scales, storage_of
from abliterator.formats._layout import Mxfp4Layout
from abliterator.judge import RuleJudge
from abliterator.model import load_model, render_chat
from abliterator.recipe import Edit, load_recipe
from abliterator.statistics import Interval, mean_interval, rate_interval
from tests.helpers.packed import PACKED
from tests.helpers.quantised import FORMATS, mxfp4, pack_linear, rewrite

ROOT = Path(__file__).parents[1]
TOKENS = 40
WAYS = {
    "plain rounding": {"quantized": "keep", "rounding": "nearest"},
    "keep": {"quantized": "keep", "rounding": "compensated"},
    "dequantize": {"quantized": "dequantize", "rounding": "compensated"},
}
NAMES = ("fp8_block", "compressed_row", "compressed_tensor", "mxfp4", *PACKED)


class Said(NamedTuple):
    """What a model does: whether it declined each request, and [n, V] after ordinary prompts."""

    declined: list[bool]
    logprobs: Tensor


class Asked:
    """The prompts, and one model in memory whose weights are replaced."""

    def __init__(self, model: Path, n: int, requests: int) -> None:
        self.engine = TransformersEngine(load_model(model, device="cpu", dtype="float32"))
        folder = ROOT / "recipes" / "smollm2"
        self._requests, self._ordinary = (
            [json.loads(line)["prompt"] for line in (folder / f"{name}.jsonl").open()][:count]
            for name, count in (("declined_heldout", requests), ("ordinary", n))
        )
        self.original = self.again()

    def ask(self, weights: dict[str, Tensor]) -> Said:
        """Answers with these weights, by name, in place of the model's."""
        parameters = dict(self.engine.loaded.model.named_parameters())
        for name, weight in weights.items():
            parameters[name].data.copy_(weight)
        return self.again()

    def again(self) -> Said:
        """Answers with what is in memory, and the hooks that are on it."""
        answers = self.engine.answers(
            self._ids(self._requests), max_new_tokens=TOKENS, batch_size=24
        )
        judge = RuleJudge()
        judged = [
            judge.judge(prompt, answer.text, finish_reason=answer.finish_reason)
            for prompt, answer in zip(self._requests, answers, strict=True)
        ]
        paths = [AnswerPath(tuple(ids), 1) for ids in self._ids(self._ordinary)]
        logits = dict(self.engine.logits(paths, max_batch_tokens=1024))
        rows = torch.cat([logits[index] for index in range(len(paths))])
        return Said([bool(said.refused) for said in judged], rows.float().log_softmax(dim=1))

    def _ids(self, prompts: Sequence[str]) -> list[list[int]]:
        return [render_chat(self.engine.tokenizer, prompt) for prompt in prompts]


def stored(model: Path, name: str, folder: Path) -> None:
    """Writes the model in a format to `folder`; MXFP4's numbers, as the docstring above says."""
    shutil.copytree(model, folder)

    def quantise(tensor: str, weight: Tensor) -> dict[str, Tensor]:
        if not tensor.endswith("_proj.weight"):
            return {tensor: weight}
        numbers, scale = FORMATS[name].quantise(weight.float())
        return {tensor: numbers, tensor + FORMATS[name].suffix: scale}

    if name in PACKED:
        pack_linear(folder, name)
        return
    if name != "mxfp4":
        rewrite(folder, quantise, FORMATS[name].settings)
        return
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for tensor in filter(_in_mxfp4, tensors):
            tensors[tensor] = _numbers(*mxfp4(tensors[tensor].float().T[None])).bfloat16()
        save_file(tensors, path, metadata={"format": "pt"})


def _in_mxfp4(tensor: str) -> bool:
    return ".mlp." in tensor


def _numbers(blocks: Tensor, exponents: Tensor) -> Tensor:
    return mxfp4_numbers(blocks[0]) * mxfp4_scales(exponents[0])


def weights_of(folder: Path) -> dict[str, Tensor]:
    """The weights of all linear modules as float32."""
    checkpoint = Checkpoint.open(folder)
    storage, found = storage_of(checkpoint.config), {}
    for name in checkpoint.tensors:
        if storage.weight_name(name).endswith("_proj.weight"):
            layout = storage.layout(name, checkpoint.tensors)
            scales = layout.scales_from(checkpoint.read)
            (matrix,) = layout.matrices(bytearray(checkpoint.read(name)), 0, scales)
            found[storage.weight_name(name)] = matrix.decoded(0, matrix.shape[1])
    return found


def edited_mxfp4(
    checkpoint: Checkpoint, plan: EditPlan, basis: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """The edited matrices that MXFP4 keeps, as float32."""
    for edit in plan.edits:
        if not _in_mxfp4(name := edit.info.name):
            continue
        weight = load_file(checkpoint.folder / edit.info.file)[name].float()
        blocks, exponents = (part.numpy() for part in mxfp4(weight.T[None]))
        layout = Mxfp4Layout(name, "U8", blocks.shape, (name + "_scales",), name)
        as_expert = replace(edit, writer=replace(edit.writer, axis=1), layout=layout, stored=layout)
        removal = removal_of(edit.writer, checkpoint, basis)
        buffer, scales = bytearray(blocks.tobytes()), (exponents.tobytes(),)
        edit_stored(memoryview(buffer), as_expert, removal, plan.settings, scales=scales)
        (matrix,) = layout.matrices(buffer, 1, scales)
        yield name, matrix.decoded(0, matrix.shape[1])


def told(interval: Interval | None, digits: int) -> str:
    """A value with its interval."""
    if interval is None or interval.low is None:
        return "-" if interval is None else f"{interval.value:.{digits}f}"
    return f"{interval.value:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def row(name: str, way: str, said: Said, base: Said, exact: Said, megabytes: float) -> None:
    """Prints one line of the table."""
    declined, n = sum(said.declined), len(said.declined)
    shown = told(rate_interval(declined, n), 2) if n else "-"
    moved, off = (kl_divergence(other.logprobs, said.logprobs) for other in (base, exact))
    print(
        f"| {name} | {way} | {declined}/{n} {shown} | "
        f"{told(mean_interval(moved.tolist()), 4)} | {told(mean_interval(off.tolist()), 4)} | "
        f"{megabytes:.0f} |",
        flush=True,
    )


def compare(asked: Asked, model: Path, name: str, basis: Tensor, edit: Edit) -> None:
    """The lines of one format."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, out = Path(temporary) / "base", Path(temporary) / "out"
        stored(model, name, folder)
        checkpoint = Checkpoint.open(folder)
        anatomy = anatomy_of(checkpoint.config)
        infos = checkpoint.tensors.values()
        # 17 bytes hold 32 numbers and their scale; bfloat16 takes 64
        saved = sum(t.nbytes * 47 / 64 for t in infos if name == "mxfp4" and _in_mxfp4(t.name))
        plan = plan_edits(checkpoint, anatomy, edit)
        size = checkpoint.total_bytes - saved
        base = asked.ask(weights_of(folder))
        with asked.engine.edited(WriterEdit(plan, basis)):
            exact = asked.again()
        row(name, "base", base, asked.original, exact, size / 1e6)
        row(name, "exact edit", exact, base, exact, size / 1e6)
        for way, settings in WAYS.items():
            chosen = plan.settings.model_copy(update=settings)
            plan = plan_edits(checkpoint, anatomy, chosen)
            bake(checkpoint, plan, basis, out)
            weights, size = weights_of(out), Checkpoint.open(out).total_bytes
            if name == "mxfp4" and way != "dequantize":
                weights |= dict(edited_mxfp4(checkpoint, plan, basis))
                size -= saved
            row(name, way, asked.ask(weights), base, exact, size / 1e6)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("subspace", type=Path)
    parser.add_argument("--n", type=int, default=72, help="prompts of each set")
    parser.add_argument("--requests", type=int, help="of those that are declined; 0: KL alone")
    parser.add_argument("--formats", nargs="+", choices=NAMES, default=NAMES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    basis = load_subspace(arguments.subspace).basis
    edit = load_recipe(ROOT / "recipes" / "smollm2.yaml").edit
    requests = arguments.n if arguments.requests is None else arguments.requests
    asked = Asked(arguments.model, arguments.n, requests)
    print("| format | way | declines | KL from the base | KL from the exact edit | MB |")
    print("|---|---|---|---|---|---|")
    for name in arguments.formats:
        compare(asked, arguments.model, name, basis, edit)


if __name__ == "__main__":
    main()
