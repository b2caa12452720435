"""What the contrast is worth: answered requests of the same forms against ordinary prompts.

    python benchmarks/contrast_table.py MODEL_FOLDER [--layers 18 20] [--prompts 72] [--tokens 64]

MODEL_FOLDER is made by recipes/smollm2/make_model.py. For each contrast, layer and strength, the
edit runs as hooks on every writer of one loaded model (equal to the baked weights), the rule judge
reads greedy answers to held-out declined requests and to ordinary prompts, and the KL divergence of
the first token is taken on the ordinary ones.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

from abliterator.anatomy import anatomy_of
from abliterator.bake import EditSettings, plan_edits, preview_edit
from abliterator.capture import capture
from abliterator.checkpoint import Checkpoint
from abliterator.directions import fit_directions, stack
from abliterator.divergence import first_token_logprobs, kl_divergence
from abliterator.generation import generate, stop_ids
from abliterator.judge import RuleJudge
from abliterator.model import LoadedModel, block_paths, load_model, render_chat

PROMPTS = Path(__file__).parents[1] / "recipes" / "smollm2"
CONTRASTS = {"same forms, answered": "answered", "ordinary prompts": "ordinary_train"}
STRENGTHS = {
    "attention": {"attention": 1.0},
    "attention + mlp/2": {"attention": 1.0, "mlp": 0.5},
    "all": {"attention": 1.0, "mlp": 1.0},
}


def read(name: str, limit: int | None = None) -> list[str]:
    """Prompts of one file."""
    lines = (PROMPTS / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines][:limit]


def grade(loaded: LoadedModel, prompts: list[str], tokens: int) -> tuple[int, float, float]:
    """Declined answers, mean compliance and mean coherence by the rule judge."""
    ids = [render_chat(loaded.tokenizer, prompt) for prompt in prompts]
    answers = generate(loaded, ids, max_new_tokens=tokens, batch_size=24, stop_ids=stop_ids(loaded))
    judge = RuleJudge()
    found = [
        judge.judge(prompt, answer.text, finish_reason=answer.finish_reason)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    declined = sum(bool(verdict.refused) for verdict in found)
    return declined, mean(v.compliance for v in found), mean(v.coherence for v in found)


def main() -> None:
    """Prints one row a contrast, layer and strength."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[18, 20, 22, 24, 26])
    parser.add_argument("--prompts", type=int, default=72)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    loaded = load_model(arguments.model, device="cpu", dtype="float32")
    checkpoint = Checkpoint.open(arguments.model)
    anatomy = anatomy_of(checkpoint.config)
    blocks = block_paths(anatomy.blocks, anatomy.n_layers)

    def rendered(prompts: list[str]) -> list[list[int]]:
        return [render_chat(loaded.tokenizer, prompt) for prompt in prompts]

    target, neutral = (read(n, arguments.prompts) for n in ("declined_heldout", "ordinary"))
    base = first_token_logprobs(loaded, rendered(neutral), max_batch_tokens=2048)
    declines = capture(loaded, rendered(read("declined")), blocks=blocks)
    print(
        f"n = {len(target)} held-out declined, {len(neutral)} ordinary; {arguments.tokens} tokens"
    )
    print(
        f"{'contrast':22s}{'layer':>6s}  {'writers':18s} declined  compl.  coher.   KL  ord. coher."
    )

    def row(label: str, layer: str, writers: str) -> None:
        declined, compliance, coherence = grade(loaded, target, arguments.tokens)
        kept = grade(loaded, neutral, arguments.tokens)[2]
        now = first_token_logprobs(loaded, rendered(neutral), max_batch_tokens=2048)
        kl = float(kl_divergence(base, now).mean())
        print(
            f"{label:22s}{layer:>6s}  {writers:18s} {declined:8d} {compliance:7.3f} "
            f"{coherence:7.3f} {kl:6.3f} {kept:7.3f}",
            flush=True,
        )

    row("base", "-", "-")
    for label, name in CONTRASTS.items():
        contrast = capture(loaded, rendered(read(name)), blocks=blocks)
        directions = fit_directions(declines, contrast)
        for layer in arguments.layers:
            basis = stack(directions, (layer,)).basis
            for writers, strength in STRENGTHS.items():
                plan = plan_edits(checkpoint, anatomy, EditSettings(strength=strength))
                with preview_edit(loaded, plan, basis):
                    row(label, str(layer), writers)


if __name__ == "__main__":
    main()
