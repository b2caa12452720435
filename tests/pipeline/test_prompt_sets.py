"""Which prompts are used for what, as a run tells it: on the terminal, in the record, on the card.

What differs only in case, spacing, punctuation or invisible characters is one prompt; what nearly
is one is counted and stays.
"""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from abliterator.cli import main
from abliterator.pipeline._planning._planned_prompts import planned_prompts
from abliterator.pipeline.stages.prompts import compared, load_sets, uses
from abliterator.recipe import Rollouts, load_recipe

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "abliterator" / "data" / "demo" / "model"
RECIPE = """
model: {model}
layers: [2]
k: 1
prompts:
  target: {{path: target.txt}}
  neutral: {{path: neutral.txt}}
  evaluation: {{path: evaluation.jsonl}}
rollouts: {{max_new_tokens: 4}}
"""
REQUESTS = [f"Please tell me where the {x} is kept?" for x in ("bell", "boat", "book")]


@pytest.fixture
def project(tmp_path, tiny_folder, monkeypatch):
    """Twelve target prompts: three evaluation prompts in disguise, two duplicates, a near one."""
    monkeypatch.chdir(tmp_path)
    disguised = [
        f"“{REQUESTS[0]}”".replace("?", "."),
        REQUESTS[1].replace("where", "whe\u200bre"),
        REQUESTS[2].replace("kept", "ke\u00adpt").upper(),
    ]
    others = [f"What does {x} cook?" for x in ("Neva", "Lorin", "Peric", "Fenda", "Jorda", "Hesk")]
    near = "Please tell me now where the boat is kept?"
    again = [f" {others[0]}", others[0].rstrip("?")]
    # the line ends of an old Mac
    target = "\r".join([*disguised, *others, near, *again])
    Path("target.txt").write_bytes(target.encode())
    Path("neutral.txt").write_text("\n".join(f"How old is {x}?" for x in "abcdefgh"))
    rows = [json.dumps({"prompt": text}) for text in REQUESTS]
    Path("evaluation.jsonl").write_text("\n".join(rows))
    Path("r.yaml").write_text(RECIPE.format(model=tiny_folder("llama")))


def run(*arguments):
    done = CliRunner().invoke(main, [*arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def test_what_was_read_and_dropped_is_told(project):
    done = run("build", "r.yaml", "--out", "out")
    told = (
        "target, extraction: 7 prompts of target.txt (12 read; 2 duplicates or empty, dropped; "
        "3 evaluation prompts too, dropped; 1 kept though nearly equal to an evaluation prompt)"
    )
    assert told in done.stderr.splitlines()
    assert "target, evaluation: 3 prompts of evaluation.jsonl (3 read)" in done.stderr.splitlines()
    alike = "target, evaluation: 2 prompts nearly equal an earlier one of the set"
    assert alike in done.stderr.splitlines()
    record = json.loads(Path("out/checkpoint/abliterator/record.json").read_text())["provenance"]
    (target,) = [s for s in record["prompts"] if s["name"] == "target, extraction"]
    counts = {name: target[name] for name in ("read", "dropped", "overlap", "n", "near")}
    assert counts == {"read": 12, "dropped": 5, "overlap": 3, "n": 7, "near": 1}
    assert (record["dropped_overlap"], record["near_duplicate"]) == (3, 0.75)
    card = Path("out/checkpoint/README.md").read_text(encoding="utf-8")
    assert (
        "| `target, extraction` | `target.txt` | Local | - | Not stated | 12 | 2 | 3 | 7 | 1 |"
        in card
    )
    assert "(overlap: 3 in all)" in card


@pytest.mark.parametrize(
    ("recipe", "counts", "near"),
    [("demo", [96, 96, 96, 96], [0, 0, 0, 0]), ("smollm2", [144, 144, 72, 72], [2, 0, 0, 0])],
)
def test_templated_sets_keep_all_that_they_have(recipe, counts, near):
    """Requests of the same forms are different prompts.

    None is nearly an evaluated one, but for two of SmolLM2's that differ from one in a word.
    """
    prompts = load_recipe(ROOT / "recipes" / f"{recipe}.yaml").prompts
    sets = [s for _, s in uses(compared(load_sets(prompts, seed=0, neutral_too=False)))]
    assert [len(s.prompts) for s in sets] == counts
    assert [(s.read, s.dropped) for s in sets] == [(n, 0) for n in counts]
    assert [s.near or 0 for s in sets] == near


def test_near_duplicates_and_short_sets_are_notes_of_a_plan(tmp_path):
    kept = [f"Please {ask} me where the bell is kept?" for ask in ("tell", "show")]
    others = [f"What does {x} cook for us?" for x in ("Neva", "Lorin")]
    texts = {
        "target": [kept[0], "Boil the rice until it is soft.", "Who won?"],
        "neutral": ["How old is Hesk?", "Count to three."],
        "neutral_evaluation": [*others, "Where is Fenda?"],
        "evaluation": [kept[1], "Sing a song for me."],
    }
    lines = ["model: embedded:demo", "layers: [4]", "k: 1", "prompts:"]
    for name, prompts in texts.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(prompts))
        lines.append(f"  {name}: {{path: {name}.txt}}")
    (tmp_path / "r.yaml").write_text("\n".join(lines))
    plans = [
        planned_prompts(load_recipe(tmp_path / "r.yaml", overrides=more), MODEL)
        for more in ([], ["prompts.near_duplicates=drop"])
    ]
    notes, without = (" ".join(plan.remarks(Rollouts(limit=100))) for plan in plans)
    assert "Of 3 prompts (target, extraction), 1 nearly equal an evaluation prompt: " in notes
    assert "Of 3 prompts (neutral, evaluation), 1 nearly equal an earlier one" in notes
    assert "target, evaluation: 2 of the 100 prompts that `rollouts.limit` asks for" in notes
    assert (
        "Of 3 prompts (target, extraction), 1 nearly equal an evaluation prompt and are" in without
    )
    assert [len(plan.lengths["target, extraction"]) for plan in plans] == [3, 2]
