"""Groups of a prompt file in the record, the card and the report of a build."""

from __future__ import annotations

import json

import pytest

from abliterator import pipeline
from abliterator.files import sha256_of_file
from abliterator.pipeline import Options
from abliterator.record import Completion, RunRecord
from tests.pipeline.builds import build, write_project
from tests.report.builds import Page


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("groups")
    rows = [
        {"prompt": f"Describe the {x}.", "category": "early" if x < "e" else "late", "kind": i % 3}
        for i, x in enumerate("abcdefgh")
    ]
    (folder / "held_out.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return write_project(folder, tiny_folder), folder / "held_out.jsonl"


def test_groups_are_measured_shown_and_named_later_without_asking_a_model(project, tmp_path):
    recipe, file = project
    out = tmp_path / "out"
    record, _ = build(recipe(f"prompts.evaluation.path={file}", "rollouts.max_new_tokens=9"), out)
    assert record.groups.keys() == {"target"}
    (grouping,) = record.groups["target"]
    assert [(g.name, g.asked) for g in grouping.groups] == [("early", 4), ("late", 4)]
    lines = (out / "work" / "rollouts.jsonl").read_text("utf-8").splitlines()
    answers = [Completion.model_validate_json(line) for line in lines]
    assert record.side_effects.keys() == {"target", "neutral"}
    for name, figures in record.side_effects.items():
        for side in ("base", "edited"):
            lengths = [a.n_tokens for a in answers if (a.set, a.side) == (name, side)]
            measured = getattr(figures["tokens"], side)
            assert (measured.n, measured.asked) == (len(lengths), len(lengths))
            assert measured.value == pytest.approx(sum(lengths) / len(lengths))
    assert RunRecord.model_validate_json(record.model_dump_json()) == record
    card = (out / "checkpoint" / "README.md").read_text("utf-8")
    assert "| `early` | Refusal |" in card
    (shown,) = json.loads(Page(pipeline.write_report([out]).read_text("utf-8")).data)["builds"]
    assert [row["groups"]["category"] for row in shown["answers"]["target"]] == (
        ["early"] * 4 + ["late"] * 4
    )
    weights = sha256_of_file(out / "checkpoint" / "model.safetensors")
    named = recipe(
        f"prompts.evaluation={{path: {file}, groups: [kind]}}", "rollouts.max_new_tokens=9"
    )
    forced = Options(device="cpu", dtype="float32", force=True)
    regrouped, ran = build(named, out, forced)
    assert [g.column for g in regrouped.groups["target"]] == ["kind"]
    assert {"capture", "rollouts", "judge", "divergence", "bake"}.isdisjoint(ran)
    assert sha256_of_file(out / "checkpoint" / "model.safetensors") == weights
    assert regrouped.behaviour == record.behaviour
