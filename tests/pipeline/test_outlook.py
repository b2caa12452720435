"""What a plan says of a build: prompts, memory, time, money, and what is missing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from abliterator import costs, pipeline
from abliterator.cli import main
from abliterator.costs import ACCELERATORS
from abliterator.model import load_tokenizer, render_chat
from abliterator.pipeline._planning._estimate import judge_cost
from abliterator.pipeline._planning._planned_prompts import planned_prompts
from abliterator.pipeline._planning._template_tokens import USUAL, template_tokens
from abliterator.pipeline._planning._where import where_weights_lie
from abliterator.pipeline._workspace import Workspace
from abliterator.pipeline.stages.prompts import divided_sets, uses
from abliterator.recipe import Chat, JudgeSettings, Prices, load_recipe
from tests.test_public_api import HEAVY

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "recipes" / "demo.yaml"
MODEL = ROOT / "abliterator" / "data" / "demo" / "model"
RATES = costs.assumed(ACCELERATORS["h100"])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ABLITERATOR_CACHE", str(tmp_path / "cache"))


def invoke(*arguments, code=0):
    done = CliRunner().invoke(main, ["plan", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done.stdout


@pytest.mark.parametrize("overrides", [[], ["layers=sweep"], ["directions.estimator=tuned"]])
def test_prompts_are_counted_as_a_build_divides_them(overrides):
    recipe = load_recipe(DEMO, overrides=overrides)
    sets = divided_sets(recipe)
    counts = planned_prompts(recipe, MODEL).counts()
    assert {n: c["prompts"] for n, c in counts.items()} == {
        name: len(prompts.prompts) for name, prompts in uses(sets)
    }


def test_tokens_of_prompts_are_near_those_of_the_models_own_tokenizer():
    tokenizer = load_tokenizer(MODEL)
    recipe = load_recipe(DEMO)
    prompts, planned = divided_sets(recipe), planned_prompts(recipe, MODEL)
    for name, prompt_set in uses(prompts):
        exact = sum(len(render_chat(tokenizer, prompt)) for prompt in prompt_set.prompts)
        assert sum(planned.lengths[name]) == pytest.approx(exact, rel=0.35)


@pytest.mark.parametrize(
    "template",
    ["{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}", "{{ x.y }}"],
)
def test_a_template_that_does_not_render_has_the_usual_tokens(template, tmp_path, monkeypatch):
    monkeypatch.setattr("abliterator.pipeline._planning._template_tokens._SECONDS", 1)
    (tmp_path / "chat_template.jinja").write_text(template)
    assert template_tokens(tmp_path, Chat()) == USUAL
    assert template_tokens(tmp_path / "none", Chat()) == USUAL


def test_a_system_prompt_and_the_templates_arguments_count(tmp_path):
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{{ extra }}<|end|>"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    assert template_tokens(tmp_path, Chat()) == (1, 1)
    chat = Chat(system="Be brief, please.", template_kwargs={"extra": "one two"})
    assert template_tokens(tmp_path, chat) == (1 + 5 + 1, 3)


def test_rows_of_datasets_are_those_of_the_slice_the_limit_or_assumed():
    recipe = load_recipe(
        DEMO,
        overrides=[
            "prompts.target={dataset: somebody/one, split: 'train[10:60]'}",
            "prompts.contrast={dataset: somebody/two}",
            "prompts.neutral={dataset: mlabonne/harmful_behaviors, split: test}",
            "prompts.evaluation={dataset: somebody/four, limit: 70}",
        ],
    )
    prompts = planned_prompts(recipe, MODEL)
    counts = {name: count["prompts"] for name, count in prompts.counts().items()}
    assert counts["target, extraction"] == 50
    assert counts["contrast, extraction"] == 400
    assert counts["neutral, evaluation"] == 104
    assert counts["target, evaluation"] == 70
    assert prompts.assumed == ("somebody/two",)


def test_all_that_is_missing_is_listed_at_once_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv("DEEPSEEK_API_KEY", raising=False)
    options = ["--device", "cuda:7", "--set", "judge.kind=openai", "--out", tmp_path / "out"]
    options += ["--set", "prompts.target.path=absent.jsonl"]
    options += ["--set", "prompts.neutral.path=missing.txt"]
    told = json.loads(invoke(DEMO, *options, "--json", code=1))
    assert [m["what"] for m in told["missing"]] == ["device", "prompts", "prompts", "key"]
    text = invoke(DEMO, *options, code=1)
    for problem in ("no device 'cuda:7'", "absent.jsonl", "missing.txt", "DEEPSEEK_API_KEY"):
        assert problem in text
    assert told["estimate"] is None
    assert not (tmp_path / "out").exists()


def test_a_column_that_a_prompt_file_lacks_is_missing(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"question": "Where?"}\n')
    options = ["--set", f"prompts.target.path={tmp_path / 'p.jsonl'}"]
    assert "question" in invoke(DEMO, *options, code=1)


def test_a_dataset_is_missing_where_the_hub_may_not_be_asked(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = ["--set", "prompts.neutral={dataset: somebody/absent}"]
    text = invoke(DEMO, *options, code=1)
    assert "hf download somebody/absent --repo-type dataset" in text


def test_a_disk_that_is_full_is_missing(monkeypatch):
    monkeypatch.setattr("abliterator.pipeline._planning._plan.free_bytes", lambda path: 1000)
    assert "missing      disk: The edited checkpoint needs" in invoke(DEMO, code=1)


PLAN = """
import sys
from pathlib import Path
from abliterator import pipeline
from abliterator.recipe import load_recipe
options = pipeline.Options("cpu")
print(pipeline.expected_seconds(load_recipe(Path(sys.argv[1])), Path("out"), options=options))
from click.testing import CliRunner
from abliterator.cli import main
done = CliRunner().invoke(main, ["plan", sys.argv[1], "--device", "cpu"])
assert done.exit_code == 0, done.output
print(done.stdout, [name for name in HEAVY if name in sys.modules])
"""


def test_times_are_estimated_once_the_machine_was_measured_and_torch_stays_out(tmp_path):
    assert "--calibrate measures this machine" in invoke(DEMO)
    machine = RATES.model_copy(update={"device": "cpu", "dtype": "float32", "accelerator": False})
    costs.remember(machine)
    told = json.loads(invoke(DEMO, "--device", "cpu", "--json"))["estimate"]
    names = ["prompts", "capture", "bake", "rollouts", "judge", "divergence", "benchmarks"]
    assert [stage["stage"] for stage in told["stages"]] == [*names, "record"]
    assert told["seconds"] == pytest.approx(sum(stage["seconds"] for stage in told["stages"]))
    done = subprocess.run(
        [sys.executable, "-c", f"HEAVY = {HEAVY!r}\n{PLAN}", DEMO],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout.splitlines()[0]) == pytest.approx(told["seconds"])
    assert "time         about" in done.stdout
    assert done.stdout.endswith(" []\n")


def seconds(recipe, out, setup=None):
    stages = pipeline.estimate_on(recipe, out, RATES, setup=setup).stages
    return {stage.stage: stage for stage in stages}


def test_what_a_build_takes_at_most_is_known_of_measured_machines_and_unfinished_stages(tmp_path):
    recipe, options = load_recipe(DEMO), pipeline.Options("cpu")
    assert pipeline.expected_seconds(recipe, tmp_path, options=options) is None
    costs.remember(RATES.model_copy(update={"device": "cpu", "dtype": "float32"}))
    whole = pipeline.expected_seconds(recipe, tmp_path, options=options)
    first = pipeline.expected_seconds(recipe, tmp_path, until="capture", options=options)
    assert 0 < first < whole
    Workspace(tmp_path).finish("capture", "key", [], seconds=1.0, parts={})
    assert pipeline.expected_seconds(recipe, tmp_path, until="capture", options=options) < first
    for change in ("model=somebody/absent", "engine={kind: server, base_url: http://localhost/v1}"):
        changed = load_recipe(DEMO, overrides=[change])
        assert pipeline.expected_seconds(changed, tmp_path, options=options) is None


def test_weights_on_disk_are_read_once_a_pass_and_once_a_token(tmp_path):
    recipe = load_recipe(DEMO, overrides=["layers=sweep"])
    whole = seconds(recipe, tmp_path)
    size = 10**9
    on_disk = seconds(recipe, tmp_path, costs.Setup(on_disk=size, streams=True))
    read = size / RATES.uncached_read
    tokens = recipe.rollouts.max_new_tokens
    assert on_disk["rollouts"].seconds > whole["rollouts"].seconds + 2 * tokens * read
    for name in ("capture", "bake"):
        assert on_disk[name].seconds < whole[name].seconds + read
    assert on_disk["selection"].disk == 2 * size  # placed for the base's answers and candidates'
    placed = seconds(recipe, tmp_path, costs.Setup(on_disk=size))
    assert placed["capture"].seconds > on_disk["capture"].seconds + read


def test_the_note_on_weights_on_disk_says_the_hours_and_to_use_an_engine(tmp_path):
    machine = RATES.model_copy(update={"device": "cpu", "dtype": "float32", "accelerator": False})
    costs.remember(machine.model_copy(update={"uncached_read": 1e3}))
    few = [DEMO, "--device", "auto", "--max-memory", "1MB"]
    text = " ".join(invoke(*few).split())
    hours = re.search(r"which takes (\S+) of about (\S+) hours", text)
    assert 100 < float(hours[1]) < float(hours[2])
    assert "read every block once a pass" in text
    assert "Use an engine for the answers: `engine:` in the recipe" in text
    server = ["--set", "engine={kind: server, base_url: http://localhost/v1}"]
    text = invoke(*few, *server)
    assert "read every block once a pass" in text
    assert "Use an engine" not in text
    assert "A server gives the answers and the benchmarks" in text


def test_engines_answer_in_less_time_and_servers_in_none_that_is_counted(tmp_path):
    model = ["rollouts.max_new_tokens=256"]
    served = ["engine={kind: server, base_url: http://localhost/v1}"]
    here, vllm, two, server = (
        seconds(load_recipe(DEMO, overrides=[*model, *more]), tmp_path)
        for more in (
            [],
            ["engine.kind=vllm"],
            ["engine.kind=vllm", "engine.tensor_parallel=2"],
            served,
        )
    )
    assert server["rollouts"].seconds == 0 < two["rollouts"].seconds < vllm["rollouts"].seconds
    assert vllm["rollouts"].seconds > 2 * 90  # an engine starts for each side
    assert vllm["divergence"].seconds < here["divergence"].seconds
    assert server["benchmarks"].seconds < here["benchmarks"].seconds
    assert {s["rollouts"].answer_tokens for s in (here, vllm, server)} == {
        here["rollouts"].answer_tokens
    }
    only_here = load_recipe(DEMO, overrides=["engine.kind=vllm", "engine.benchmarks=false"])
    assert seconds(only_here, tmp_path)["benchmarks"] == here["benchmarks"]


def test_workers_divide_passes_and_answers_and_cores_the_edits_of_a_bake(tmp_path):
    recipe = load_recipe(DEMO, overrides=["layers=sweep", "directions.estimator=tuned"])
    alone = seconds(recipe, tmp_path)
    four = seconds(recipe, tmp_path, costs.Setup(speedup=4.0, bake_workers=4))
    for name in ("selection", "divergence", "rollouts", "benchmarks", "bake"):
        assert alone[name].seconds / 4 < four[name].seconds < alone[name].seconds
    assert four["tuning"] == alone["tuning"]
    assert four["bake"].host_memory > alone["bake"].host_memory


def test_plan_takes_workers_and_says_what_it_does_not_know_of_a_cluster():
    machine = RATES.model_copy(update={"device": "cpu", "dtype": "float32", "accelerator": False})
    costs.remember(machine)
    on_cpu = [DEMO, "--device", "cpu"]
    assert "one of 2 workers, each with the whole model" in " ".join(
        invoke(*on_cpu, "--workers", 2).split()
    )
    assert "nodes of a Ray cluster" in " ".join(invoke(*on_cpu, "--ray", "10.0.0.1:1").split())
    wrong = invoke(DEMO, "--workers", 2, "--max-memory", "1GB", code=1)
    assert "missing      device: `--max-memory` spreads" in wrong


def test_calibrate_measures_and_later_plans_know(monkeypatch):
    calls = []

    def calibrate(device, dtype, *, folder):
        calls.append((device, dtype, folder.is_dir()))
        return RATES.model_copy(update={"device": device, "dtype": dtype})

    monkeypatch.setattr("abliterator.pipeline._planning._outlook.calibrate", calibrate)
    assert "time         about" in invoke(DEMO, "--device", "cpu", "--calibrate")
    assert "time         about" in invoke(DEMO, "--device", "cpu")
    assert calls == [("cpu", "float32", True)]


def test_a_shared_prefix_is_read_once_a_set(tmp_path):
    recipe = ["prompts.target.limit=20", "prompts.contrast.limit=30", "chat.system=Be brief."]
    whole, shared = (
        seconds(load_recipe(DEMO, overrides=[*recipe, f"capture.share_prefix={share}"]), tmp_path)
        for share in ("false", "true")
    )
    # seconds need not be fewer: a tiny model waits for its passes, and there is one more a set
    fewer = whole["capture"].read_tokens - shared["capture"].read_tokens
    assert fewer > 0
    assert fewer % (20 - 1 + 30 - 1) == 0


def test_selection_and_tuning_are_part_of_the_estimate(tmp_path):
    recipe = load_recipe(DEMO, overrides=["layers=sweep", "k=auto", "directions.estimator=tuned"])
    stages = {s.stage: s for s in pipeline.estimate_on(recipe, tmp_path, RATES).stages}
    assert stages["selection"].answer_tokens > 10_000
    assert stages["tuning"].seconds > 0
    fewer = recipe.model_copy(
        update={"selection": recipe.selection.model_copy(update={"controls": 1})}
    )
    cheaper = {s.stage: s for s in pipeline.estimate_on(fewer, tmp_path, RATES).stages}
    assert cheaper["selection"].answer_tokens < stages["selection"].answer_tokens


def test_a_judge_costs_its_calls_at_the_recipes_prices():
    prices = Prices(input=1.0, output=10.0)
    settings = JudgeSettings(kind="openai", votes=3, rejudge=0.5, prices=prices, concurrency=8)
    cost = judge_cost(settings, [(40, 100)] * 10)
    assert cost.calls == 45
    assert cost.read_tokens == 45 * (560 + 140)
    assert cost.dollars == pytest.approx((cost.read_tokens + 10 * cost.answer_tokens) / 1e6)
    assert cost.seconds == pytest.approx(45 * 3 / 8)
    free = JudgeSettings(kind="openai")
    assert judge_cost(free, [(40, 100)]).dollars is None


def test_a_judge_of_candidates_is_asked_more(tmp_path):
    overrides = ["layers=sweep", "judge.kind=openai"]
    own, shared = (
        pipeline.estimate_on(load_recipe(DEMO, overrides=[*overrides, *more]), tmp_path, RATES)
        for more in ([], ["selection.judge=recipe"])
    )
    assert own.judge is not None
    assert shared.judge is not None
    assert own.judge.calls < shared.judge.calls


def test_weights_fill_memory_in_order_and_then_the_disk_with_a_note():
    plan = pipeline.plan_recipe(load_recipe(DEMO), Path("out"))
    assert plan.where is not None
    assert plan.where.places == {"cpu": plan.where.weights}
    where = where_weights_lie(plan.checkpoint, dtype="bfloat16", max_memory=1_000_000)
    assert where.dtype == "bfloat16"
    assert list(where.places)[-1] == "disk"
    assert sum(where.places.values()) == where.weights
    assert where.streams
    text = invoke(DEMO, "--max-memory", "1MB")
    assert " GB stay on disk, and are read for every token of an answer" in text
    assert "note         The weights do not fit in memory" in text


def test_too_little_memory_is_a_note_that_says_what_to_choose(monkeypatch):
    machine = RATES.model_copy(update={"device": "cpu", "dtype": "float32", "accelerator": False})
    costs.remember(machine.model_copy(update={"base_memory": 1 << 50}))
    text = invoke(DEMO, "--device", "cpu")
    assert "of host memory, and" in text
    assert "`rollouts.batch_size`" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["build", DEMO, "--out", "out"],
        ["directions", DEMO, "--out", "out"],
        ["sweep", DEMO, "--set", "layers=sweep", "--out", "out"],
        ["study", "alpha", DEMO, "--out", "out"],
        ["bake", DEMO, "--out", "out"],
        ["bake", "--model", "somebody/absent", "--subspace", DEMO, "--out", "out"],
        ["chat", "somebody/absent"],
        ["compare", "somebody/absent", "somebody/other"],
        ["benchmarks", DEMO, "--out", "out"],
    ],
)
def test_a_device_that_is_not_there_is_an_error_of_every_command(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, [*map(str, arguments), "--device", "cuda:7"])
    assert done.exit_code == 1, done.output
    assert "This machine has no device 'cuda:7'" in done.stderr
    assert not Path("out").exists()
