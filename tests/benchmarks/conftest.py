"""The toy tasks in a recipe's folder, and models on which they are run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from abliterator.benchmarks import TaskScores, resolve_tasks
from tests.benchmarks.toy import CHOICE, QUESTIONS, SAY, always, run, save_model


@pytest.fixture(autouse=True, scope="module")
def _private_dataset_cache(tmp_path_factory):
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A recipe's folder with both tasks in tasks/ and their documents in tasks/data/."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "tasks/data").mkdir(parents=True)
    lines = "".join(json.dumps(doc) + "\n" for doc in QUESTIONS)
    (folder / "tasks/data/questions.jsonl").write_text(lines)
    for task in (CHOICE, SAY):
        (folder / f"tasks/{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture(scope="module")
def tasks(recipe):
    return resolve_tasks(["tasks/toy_choice.yaml", "tasks/toy_say.yaml"], folder=recipe)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def says_no(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("no"), always("no"))


@pytest.fixture(scope="module")
def says_yes(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("yes"), always("yes"))


@pytest.fixture(scope="module")
def scores(plain, tasks) -> dict[str, TaskScores]:
    return run(plain, tasks, batch_size=7)


@pytest.fixture
def offline(monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
