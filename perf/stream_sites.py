"""What is left of a behaviour where blocks mix several streams, by the site of its removal.

    python perf/stream_sites.py                      # tests/models/streams, which declines cooking
    python perf/stream_sites.py --layers 3 4,3       # other subspaces: one direction a layer named

The directions are mean differences at the last token of a prompt: of what a block's sublayers hand
to the mixing, which is where a build takes them, of what the last of them (the MLP) does alone, or
of the mean of the streams after the block.
They are removed from all streams after every block by a hook, at every writer by a hook, and from
the writers' weights.
Declines are the rule judge's, of 32 tokens; KL is per answer token, along the base's own answers to
ordinary prompts; brackets are 95 % intervals. *In the streams* is the largest share |Qᵀ h| / |h| of
a stream after the last block, the mean over prompts: what was there from the embeddings is removed
by the first site alone. All numbers are in float32.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from abliterator.anatomy import anatomy_of
from abliterator.bake import EditPlan, bake, plan_edits
from abliterator.capture import capture
from abliterator.checkpoint import Checkpoint
from abliterator.engines import StreamEdit, TransformersEngine
from abliterator.evaluation import EditEvaluator, EvaluationContext, RenderedPrompts
from abliterator.judge import RuleJudge
from abliterator.model import hooked, load_model, render_chat
from abliterator.recipe import Edit
from abliterator.record import Estimate
from abliterator.subspace import orthonormal_basis
from tests.helpers.organisms import organism, prompts

SITES = ("sublayers", "the last sublayer", "streams")


def rendered(engine: TransformersEngine, name: str) -> RenderedPrompts:
    """A prompt set of the demo, with token ids."""
    texts = prompts(name)
    return RenderedPrompts(texts, [render_chat(engine.tokenizer, text) for text in texts])


def directions(engine: TransformersEngine, taken_at: str) -> Tensor:
    """Mean differences [L, H] of target and contrast prompts at their last token."""
    mean = {
        "sublayers": lambda ids: capture(engine, ids).mean,
        "the last sublayer": partial(_mean, engine, [paths[-1] for paths in engine.residuals]),
        "streams": partial(_mean, engine, engine.blocks),
    }
    target, contrast = (
        mean[taken_at](rendered(engine, name).token_ids) for name in ("target", "contrast")
    )
    return target - contrast


def at_last_token(output: Tensor) -> Tensor:
    """[S, H] of one prompt's [1, T, H], [1, T, S, H], or Gemma 3n's [S, 1, T, H]."""
    if output.ndim == 4 and output.shape[1] == 1:
        output = output.permute(1, 2, 0, 3)
    return output[0, -1].double().view(-1, output.shape[-1])


def _mean(
    engine: TransformersEngine, modules: Sequence[str], token_ids: Sequence[Sequence[int]]
) -> Tensor:
    """[L, H] float64: what a module of each block hands on, the mean of streams and prompts."""
    sums = torch.zeros(engine.hidden_shape, dtype=torch.float64)

    def add(layer: int, output: Tensor) -> None:
        sums[layer] += at_last_token(output).mean(dim=0)

    hooks = {path: partial(add, layer) for layer, path in enumerate(modules)}
    with torch.inference_mode(), hooked(engine.loaded.model, hooks):
        for ids in token_ids:
            engine.loaded.model(torch.tensor([list(ids)]), use_cache=False)
    return sums / len(token_ids)


def share_in_streams(engine: TransformersEngine, basis: Tensor) -> float:
    """Mean over prompts of the largest share of a stream in the subspace, after the last block."""
    shares: list[float] = []

    def measure(streams: Tensor) -> None:
        last = at_last_token(streams)
        shares.append(float(((last @ basis).norm(dim=-1) / last.norm(dim=-1)).max()))

    with torch.inference_mode():
        for ids in rendered(engine, "evaluation").token_ids:
            with hooked(engine.loaded.model, {engine.blocks[-1]: measure}):
                engine.loaded.model(torch.tensor([list(ids)]), use_cache=False)
    return sum(shares) / len(shares)


def bracketed(estimate: Estimate | None) -> str:
    """A value with its interval, and n."""
    if estimate is None:
        return "-"
    low, high = estimate.low, estimate.high
    interval = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    return f"{estimate.value:.3f}{interval}, n {estimate.n}"


def compare(evaluator: EditEvaluator, basis: Tensor, name: str, baked: Callable[[], None]) -> None:
    """Prints the lines of one subspace."""
    engine, nothing = evaluator.context.engine, StreamEdit(basis, alpha=0.0)
    assert isinstance(engine, TransformersEngine)
    sites = {
        "none": nothing,
        "all streams after every block, by hook": StreamEdit(basis, alpha=1.0),
        "every writer, by hook": evaluator.context.writer_edit(basis),
        "every writer, baked": nothing,
    }
    for site, edit in sites.items():
        if site.endswith("baked"):
            baked()
        measured = evaluator.measure(site, edit)
        with engine.edited(edit):
            share = share_in_streams(engine, basis)
        declined = bracketed(measured.judged.summary.refusal)
        kl = bracketed(measured.divergence.kl)
        print(f"| {name} | {site} | {declined} | {kl} | {share:.3f} |", flush=True)


def set_weights(engine: TransformersEngine, folder: Path) -> None:
    """Copies the stored weights of a checkpoint into the model in memory."""
    parameters = dict(engine.loaded.model.named_parameters())
    other = dict(load_model(folder, device="cpu", dtype="float32").model.named_parameters())
    for path, parameter in parameters.items():
        parameter.data.copy_(other[path].data)


def run(
    base: Path,
    engine: TransformersEngine,
    plan: EditPlan,
    layers: list[list[int]],
    taken_at: list[str],
) -> None:
    """Prints the table."""
    sets = [rendered(engine, name) for name in ("evaluation", "neutral")]
    limits = {"max_new_tokens": 32, "kl_tokens": 32, "batch_size": 32}
    context = EvaluationContext(engine, plan, *sets, RuleJudge(), **limits)
    columns = ("layers", "taken at", "removed at", "declined", "KL on ordinary answers")
    print(f"| {' | '.join(columns)} | in the streams |")
    print("|---" * (len(columns) + 1) + "|")
    with (
        tempfile.TemporaryDirectory() as scratch,
        EditEvaluator(context, Path(scratch) / "logits") as evaluator,
    ):
        for chosen, site in product(layers, taken_at):
            means = directions(engine, site)
            basis = orthonormal_basis(means[[layer - 1 for layer in chosen]])
            name = "+".join(map(str, chosen)) + f" | {site}"
            out = Path(scratch) / name

            def baked(out: Path = out, basis: Tensor = basis) -> None:
                bake(Checkpoint.open(base), plan, basis, out)
                set_weights(engine, out)

            compare(evaluator, basis, name, baked)
            set_weights(engine, base)


def main() -> None:
    """Reads the arguments and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="streams", help="folder, or one of tests/models")
    parser.add_argument("--taken-at", nargs="+", choices=SITES, default=SITES)
    parser.add_argument("--layers", nargs="+", default=["1", "4"], help="of each subspace")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        base = organism(arguments.model, Path(temporary) / "base")
        engine = TransformersEngine(load_model(base, device="cpu", dtype="float32"))
        checkpoint = Checkpoint.open(base)
        anatomy = anatomy_of(checkpoint.config)
        plan = plan_edits(checkpoint, anatomy, Edit(partial=anatomy.partial is not None))
        layers = [list(map(int, names.split(","))) for names in arguments.layers]
        run(base, engine, plan, layers, arguments.taken_at)


if __name__ == "__main__":
    main()
