"""Fronts of tuned edits: a direction of each block against U and V of each matrix.

    python scripts/smollm2/make_model.py smollm2-135m-instruct
    python perf/per_writer.py smollm2-135m-instruct OUT

Every form is tuned from the same start with the same losses, steps and seed, and measured on the
same held-out prompts of the training forms; about five minutes of one core each. No evaluation
prompt is read. A form that OUT has already is not tuned again.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from abliterator import pipeline
from abliterator.recipe import load_recipe
from abliterator.record import Tuning
from abliterator.tables import cell, terminal_table

RECIPE = Path(__file__).parents[1] / "recipes" / "smollm2_tuned.yaml"
SHARED = ["tuning.kl_weights=[20]", "tuning.scales=[1.0, 0.5, 0.25]"]
OWN = ["directions.stack=per_writer"]
FORMS = {
    "per_layer": ["directions.stack=per_layer"],
    "per_writer": OWN,
    "per_writer, ridge 0": [*OWN, "tuning.ridge=0"],
    "per_writer, ridge 3": [*OWN, "tuning.ridge=3"],
    "per_writer, r = 2": [*OWN, "layers=[24, 20]", "k=2"],
}


def tuned(name: str, overrides: list[str], model: str, out: Path) -> tuple[Tuning, float]:
    """The trials of one form, and the CPU seconds that they took."""
    seconds = out / "cpu_seconds"
    if not seconds.is_file():
        before = time.process_time()
        recipe = load_recipe(RECIPE, overrides=[f"model={model}", *SHARED, *overrides])
        options = pipeline.Options(device="cpu", dtype="float32")
        pipeline.run_stages(recipe, out, until="tuning", options=options)
        seconds.write_text(f"{time.process_time() - before:.0f}")
    tuning = Tuning.model_validate(json.loads((out / "work" / "tuning.json").read_text()))
    return tuning, float(seconds.read_text())


def main(model: str, out: Path, names: list[str]) -> None:
    """Prints the table, form by form."""
    head = ["form", "scale", "declined", "compliance", "product", "n", "KL", "first", "cosine"]
    rows = [[*head, "CPU s"]]
    for name in names or FORMS:
        tuning, seconds = tuned(name, FORMS[name], model, out / name.replace(" ", "_"))
        for trial in tuning.trials:
            weight = "start" if trial.kl_weight == 0 else f"{trial.scale:g}"
            grades = map(cell, (trial.refusal, trial.compliance, trial.product))
            n = "" if trial.product is None else f"{trial.product.n}"
            figures = (f"{trial.kl:.4f}", f"{trial.kl_first_token:.4f}", f"{trial.cosine:.3f}")
            rows.append([name, weight, *grades, n, *figures, f"{seconds:.0f}"])
        sys.stdout.write("\n".join(terminal_table(rows)) + "\n\n")
        sys.stdout.flush()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
