"""The demo: the README's first command, and what it must show on a model with a learned refusal."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from pydantic import BaseModel

from abliterator import pipeline
from abliterator.directions import load_subspace
from abliterator.engines import Form, Probed, TransformersEngine, WriterEdit
from abliterator.judge import Answered, Labelled, RuleJudge, calibrate
from abliterator.model import load_model, render_chat
from abliterator.pipeline import Options
from abliterator.pipeline._planning._quantization import quantized_edits
from abliterator.pipeline.stages import record as record_stage
from abliterator.prompts import PromptSet
from abliterator.recipe import load_engine, load_recipe
from abliterator.record import (
    Behaviour,
    BehaviourSide,
    Divergence,
    Estimate,
    ModelIdentity,
    RunRecord,
    TensorEdit,
)
from abliterator.source import resolve_folder
from tests.helpers.judge_server import JudgeServer, verdict

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "demo.yaml"

pytestmark = pytest.mark.slow

# What a stranger does with the folder: no abliterator anywhere.
STRANGER = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
base, edited, prompt = sys.argv[1:]
model, report = AutoModelForCausalLM.from_pretrained(edited, output_loading_info=True)
ids = [
    AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    for folder in (base, edited)
]
answer = model.generate(ids[1], max_new_tokens=32, do_sample=False)[0, ids[1].shape[1]:]
assert not any(name.split(".")[0] == "abliterator" for name in sys.modules)
print(json.dumps({
    "missing": sorted(report["missing_keys"]), "unexpected": sorted(report["unexpected_keys"]),
    "same_ids": ids[0].tolist() == ids[1].tolist(),
    "answer": AutoTokenizer.from_pretrained(edited).decode(answer, skip_special_tokens=True),
}))
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    pipeline.build(load_recipe(RECIPE), out, options=Options(device="cpu"))
    return out


@pytest.fixture(scope="module")
def record(demo):
    return pipeline.read_record(demo)


def prompts(name: str) -> list[str]:
    lines = (ROOT / "recipes" / "demo" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def test_the_refusal_goes_and_coherence_stays(record):
    target, neutral = record.behaviour["target"], record.behaviour["neutral"]
    assert target.base.refusal.value >= 0.95
    assert target.edited.refusal.value <= 0.05
    assert target.edited.coherence.value >= 0.95
    assert neutral.edited.coherence.value >= 0.95
    assert neutral.edited.refusal.value <= 0.05
    assert target.edited.refusal.n >= 64


def test_what_the_model_knows_stays(record):
    facts = record.benchmarks["demo_facts"]
    assert facts.n >= 200
    assert facts.delta.low is None or facts.delta.low <= 0 <= facts.delta.high
    assert facts.base.value > 0.5


def test_what_it_declined_to_say_comes_back(record):
    declined = record.benchmarks["demo_declined_facts"]
    assert declined.base.value <= 0.05
    assert declined.edited.value >= 0.8


def test_the_checkpoint_is_small_and_the_edit_exact(demo, record):
    assert record.edit.max_leak < 1e-3
    data = [p for p in (ROOT / "abliterator" / "data").rglob("*") if p.is_file()]
    assert sum(path.stat().st_size for path in data) <= 4 << 20


def test_a_stranger_loads_it_with_transformers_alone(demo, tmp_path):
    base = resolve_folder("embedded:demo", revision=None).folder
    arguments = [str(base), str(demo / "checkpoint"), prompts("evaluation")[0]]
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["missing"] == told["unexpected"] == []
    assert told["same_ids"]
    assert "can't help" not in told["answer"]


def test_hooks_on_every_writer_answer_as_the_baked_checkpoint_does(demo):
    """32 prompts, the same greedy text; logits apart by no more than storing in bfloat16 makes."""
    plan = pipeline.plan_recipe(load_recipe(RECIPE), demo)
    basis = load_subspace(demo / "work" / "directions.safetensors").basis
    base = load_model(plan.source.folder, device="cpu", dtype="float32")
    baked = load_model(demo / "checkpoint", device="cpu", dtype="float32")
    asked = (prompts("evaluation")[:16] + prompts("neutral")[:16])[:32]
    ids = [render_chat(base.tokenizer, prompt) for prompt in asked]
    engine = TransformersEngine(base)
    settings = {"max_new_tokens": 32, "batch_size": 32, "stop_ids": engine.stop_ids}
    plain = [answer.text for answer in engine.answers(ids, **settings)]
    with engine.edited(WriterEdit(plan.edits, basis)):
        previewed = [answer.text for answer in engine.answers(ids, **settings)]
        logits = base.model(torch.tensor([ids[0]])).logits
    written = [answer.text for answer in TransformersEngine(baked).answers(ids, **settings)]
    assert len(asked) == 32
    assert previewed == written
    assert plain != written
    apart = (baked.model(torch.tensor([ids[0]])).logits - logits).abs().max()
    assert apart < 0.02 * logits.abs().max()


# ---- no field of a record is left unset by every stage

# Fields that none of the three runs sets, and what shows that something does: a test that builds
# such a run and asserts the field, or the file that writes it.
SET_ELSEWHERE = {
    "selection.structure.position": "abliterator/selection/_structure.py",
    "tuning.strengths": "tests/tuning/test_tuning.py",  # of work/tuning.json
    "edit.experts": "tests/anatomy/test_experts.py",
    "judge.calibration": "tests/judge/test_calibrate.py",
    **dict.fromkeys(
        (f"judge.{name}" for name in ("format", "is_base", "weights_sha256", "dtype")),
        "tests/pipeline/test_local_judge.py",
    ),
    "judge.revision": "abliterator/pipeline/_local_judge.py",
    "judge.by_rules": "tests/judge/test_local_formats.py",
    **dict.fromkeys(
        (f"behaviour.{side}.thinking_refusal" for side in ("base", "edited", "delta")),
        "tests/judge/test_thoughts.py",
    ),
    "benchmarks.higher_is_better": "abliterator/benchmarks/_compare.py",
    **dict.fromkeys(
        (
            *("directions", "directions.protected", "directions.harmfulness_cosine"),
            *(
                f"directions.protected.{name}"
                for name in ("name", "prompts", "before", "protected", "left_out")
            ),
        ),
        "tests/pipeline/test_estimators.py",
    ),
    "directions.left_behind": "tests/pipeline/test_sequential.py",
    "edit.partial": "tests/anatomy/test_partial.py",
    "model.several_streams": "tests/card/test_contents.py",
    **dict.fromkeys(
        ("selection.nodes", "selection.candidates.node", "selection.stacks.nodes"),
        "tests/selection/test_demo_nodes.py",
    ),
    "quoted": "tests/card/test_contents.py",  # no stage quotes; a card shows what a record quotes
    "quoted.source": "tests/card/test_contents.py",
    "quoted.says": "tests/card/test_contents.py",
}
CONSTANT = {"tool.name"}
SURVIVAL = {  # what `abliterator survive` writes
    True: "abliterator/survival/_strengths.py",
    False: "abliterator/pipeline/_survival/_session.py",
}


def every_field(model: type[BaseModel], path: str = "") -> Iterator[str]:
    """The path of every field, nested ones too; items of lists and mappings have their owner's.

    An `Estimate` is one value: whether it has an interval depends on what was measured. So is a
    summary of behaviour or divergence that is not the record's own, which has those fields too.
    """
    for name, field in model.model_fields.items():
        yield path + name
        for inner in models_in(field.annotation):
            if (
                not path
                or inner not in (Behaviour, BehaviourSide, Divergence)
                or path == "behaviour."
            ):
                yield from every_field(inner, f"{path}{name}.")


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    if is_model and annotation is not Estimate:
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


def set_fields(value: Any, path: str = "") -> Iterator[str]:
    """Paths whose value is not the default."""
    if isinstance(value, Estimate):
        return
    if isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            held = getattr(value, name)
            default = None if field.is_required() else field.get_default()
            if held != default:
                yield path + name
            yield from set_fields(held, f"{path}{name}.")
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from set_fields(item, path)


@pytest.fixture(scope="module")
def special(tmp_path_factory, tiny_folder):
    """The record of a tiny build that drops prompts, asks a judge's server, and has groups.

    Its answers are drawn too, its prompts have clusters, and one of them is a conversation.
    """
    folder = tmp_path_factory.mktemp("special")
    names = {"target": "Where is", "neutral": "What is", "evaluation": "Who then saw"}
    lines = {name: [f"{words} the {x}?" for x in "abcdefgh"] for name, words in names.items()}
    lines["neutral"] = ["Cross a river.", "Paint my door.", "Name two birds.", "Why does it snow?"]
    lines["neutral"] += ["Sing softly.", "Who was Anna?", "Add three and four.", "Describe fire."]
    lines["target"] += [lines["target"][0], lines["evaluation"][0]]
    lines["target"].append("Who then saw it, the a?")  # nearly an evaluation prompt
    for name, prompts_of_set in lines.items():
        rows = [{"prompt": p, "category": str(i % 2)} for i, p in enumerate(prompts_of_set)]
        if name == "evaluation":
            rows.append({"messages": [{"role": "user", "content": "Where is it?"}]})
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sets = ", ".join(f"{name}: {{path: {name}.jsonl}}" for name in ("target", "neutral"))
    sets += ", evaluation: {path: evaluation.jsonl, cluster: category, limit: 20}"
    sets += ", near_duplicates: drop"
    with JudgeServer(reply=verdict("complied", "coherent")) as server:
        (folder / "r.yaml").write_text(
            f"model: {tiny_folder()}\nlayers: [2]\nk: 1\nprompts: {{{sets}}}\n"
            "rollouts: {max_new_tokens: 48, samples: 2, temperature: 0.9, top_p: 0.9, seed: 3}\n"
            f"judge: {{kind: openai, base_url: '{server.url}', model: m, api_key_env: null, "
            "votes: 3}\n"
        )
        recipe = load_recipe(folder / "r.yaml")
        return pipeline.build(recipe, folder / "out", options=Options("cpu", "float32"))


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """The record of the demo with layers, k, position and strengths found by search."""
    settings = ["layers=sweep", "k=auto", "directions.position=sweep", "selection.skip_last=0"]
    settings += ["selection.max_kl=0.01", "edit.strength=auto", "directions.estimator=tuned"]
    settings += ["tuning.steps=2", "tuning.kl_weights=[20]", "benchmarks.tasks=[]"]
    recipe = load_recipe(RECIPE, overrides=settings)
    out = tmp_path_factory.mktemp("searched") / "out"
    return pipeline.build(recipe, out, options=Options("cpu", "float32"))


def from_the_code() -> Iterator[str]:
    """Fields as the functions that the record stage calls set them, of inputs made here."""
    card = {
        "license": "other",
        "license_name": "terms",
        "license_link": "LICENSE",
        "language": "en",
        "extra_gated_prompt": "Do you agree?",
    }
    model = ModelIdentity(
        id="x",
        revision="0" * 40,
        n_layers=1,
        d_model=1,
        model_type="m",
        **record_stage.stated(card),
    )
    yield from set_fields(model, "model.")
    prompts_of_hub = PromptSet(
        name="target",
        prompts=("a",),
        source="owner/set",
        revision="0" * 40,
        split="train",
        license="mit",
        read=3,
        dropped=2,
        overlap=1,
        near=0,
    )
    origin = record_stage.prompt_origin("target, extraction", prompts_of_hub)
    yield from set_fields(origin, "provenance.prompts.")
    edit = TensorEdit(
        name="w", file="f", component="mlp", layer=0, axis=0, dtype="F8_E4M3", shape=(1, 1), k=1,
        strength=1, storage="fp8", unpacked=True, leak=0.1, noise=0.1, noise_nearest=0.1,
        sha256_before="", sha256_after="",
    )  # fmt: skip
    yield from (f"edit.quantized.{name}" for name in set_fields(quantized_edits([edit])))
    yield "edit.quantized"
    answers = {"I'm sorry, but I can't help with that.": 0.0, "A river ends in the sea.": 1.0}
    rows = [Labelled(Answered("Where?", text), label) for text, label in answers.items()]
    yield from set_fields(calibrate(rows, RuleJudge()).summary(), "judge.calibration.")
    probed = Probed(
        "http://a", "m", Form("token ids", True, True, {}), "vllm", "1.0", "bfloat16", None, ()
    )
    identity = probed.identity(load_engine(["engine.kind=server", "engine.base_url=http://a"]))
    yield from set_fields(identity, "engines.")
    yield "engines"


def test_every_field_of_a_record_is_set_by_some_run(record, special, searched):
    known = {path for run in (record, special, searched) for path in set_fields(run)}
    known |= {*from_the_code()} | CONSTANT
    every = set(every_field(RunRecord))
    survival = {path for path in every if path.partition(".")[0] == "survival"}
    elsewhere = SET_ELSEWHERE | {p: SURVIVAL[p.startswith("survival.strengths.")] for p in survival}
    for path, file in elsewhere.items():
        assert path.rpartition(".")[2] in (ROOT / file).read_text()
    assert sorted(every - known - elsewhere.keys() - {"provenance.git_commit"}) == []
    assert sorted(elsewhere.keys() & known) == []  # what is listed is special


@pytest.mark.parametrize(
    ("origin", "commit"),
    [
        (None, None),
        ('{"url": "file:///a", "dir_info": {}}', None),
        ('{"url": "https://a", "vcs_info": {"vcs": "git", "commit_id": "c0ffee"}}', "c0ffee"),
    ],
)
def test_the_commit_of_the_tool_is_that_of_its_installation(origin, commit, monkeypatch):
    installed = SimpleNamespace(read_text={"direct_url.json": origin}.get)
    monkeypatch.setattr(record_stage, "distribution", lambda name: installed)
    assert record_stage._tool_commit() == commit
