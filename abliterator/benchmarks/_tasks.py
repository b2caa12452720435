"""Resolves, checks and loads tasks with their documents, before a model is loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import Field

from abliterator.benchmarks._files import FILE_FORMATS, local_task
from abliterator.benchmarks._isolation import hub_offline, lm_eval_isolated
from abliterator.benchmarks._registry import registered_tasks, yaml_settings
from abliterator.benchmarks._scores import Aggregate
from abliterator.benchmarks.conversation import SKILLS, VERSION, Skill, items_of
from abliterator.errors import BenchmarkError, PromptError
from abliterator.files import digest_of
from abliterator.prompts import resolve_revision
from abliterator.recipe import BenchmarkTask
from abliterator.record import Frozen

LENGTH_NORMALISED = frozenset({"arc_easy", "arc_challenge", "hellaswag", "piqa"})
PREFERRED_METRICS = ("acc", "acc_norm", "exact_match")


class Spec(Frozen):
    """The input of lm-eval's constructor of a task: a YAML file, and settings that go before it.

    A local task has no file; its settings are complete.
    """

    path: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)

    def merged(self, *, functions: bool = False) -> dict[str, Any]:
        """A new dict of all settings; without `functions`, lm-eval's are given by name."""
        in_file = yaml_settings(Path(self.path), functions=functions) if self.path else {}
        return in_file | copy.deepcopy(self.settings)


class Task(Frozen):
    """A task that was resolved and loaded once, and can be run.

    `digest` covers lm-eval's version and either the task file with all its data files, or the name
    of lm-eval's own task, what its groups change of it, and the revision of its data. `limit`,
    `num_fewshot` and `chat_template` go before those of the run, where they are not None.
    """

    name: str
    digest: str
    metric: str
    higher_is_better: bool
    version: str
    documents: int  # how many there are, before any limit
    spec: Spec
    aggregates: tuple[Aggregate, ...] = ()
    dataset: str | None = None  # the Hub dataset of its documents
    revision: str | None = None  # the commit of that dataset
    limit: int | None = None
    num_fewshot: int | None = None
    chat_template: bool | None = None

    @property
    def skill(self) -> Skill | None:
        """The skill of the conversation suite that it tests; None for a task of lm-eval's."""
        return self.spec.settings.get("conversation_skill")


CONVERSATION = "conversation"  # a group of tasks, as its preset is named


def resolve_tasks(
    tasks: Sequence[str | BenchmarkTask],
    *,
    folder: Path,
    revisions: Mapping[str, str] | None = None,
) -> list[Task]:
    """Finds, checks and loads every task and its documents, without any model.

    Args:
        tasks: paths of task files (`.yaml`, relative to `folder`), names of lm-eval's tasks,
            groups and tags, or of the conversation suite and its skills.
        folder: the recipe's folder.
        revisions: commits of Hub datasets, by dataset; others are pinned to what the Hub has now.

    Raises:
        BenchmarkError: for a task that is unknown, is code, lacks its data (a missing file, or a
            Hub dataset out of reach), is listed twice, or has no metric that can be paired.
    """
    resolved: list[Task] = []
    with lm_eval_isolated():
        for task in tasks:
            request = BenchmarkTask(task=task) if isinstance(task, str) else task
            for new in _resolved(request, folder, revisions or {}):
                if any(new.name.casefold() == other.name.casefold() for other in resolved):
                    raise BenchmarkError(
                        f"The benchmark task {new.name!r} is listed twice, or another's name "
                        "differs in case alone, but results are kept in files by task name. Remove "
                        "one of the two, or give one of the files another `task:` name."
                    )
                resolved.append(new)
    return resolved


def _resolved(request: BenchmarkTask, folder: Path, revisions: Mapping[str, str]) -> list[Task]:
    if request.task.endswith((".yaml", ".yml")):
        settings, hashes = local_task(folder / request.task)
        spec = Spec(settings=settings)
        return [_checked(settings["task"], spec, request, revisions, hashes=hashes)]
    if conversations := _conversation_tasks(request):
        return conversations
    return [
        _checked(
            task.name,
            Spec(path=str(task.path), settings=task.overrides),
            request,
            revisions,
            aggregates=task.aggregates,
        )
        for task in registered_tasks(request.task)
    ]


def is_conversation(task: str | BenchmarkTask) -> bool:
    """Whether a name is of the conversation suite, which lm-eval does not run."""
    return bool(_conversation_tasks(BenchmarkTask(task=task) if isinstance(task, str) else task))


def _conversation_tasks(request: BenchmarkTask) -> list[Task]:
    """The tasks of the conversation suite that a name means; none for any other name."""
    return [
        Task(
            name=f"{CONVERSATION}_{skill}",
            digest=digest_of([VERSION, [i.model_dump(mode="json") for i in items_of(skill)]]),
            metric="acc",
            higher_is_better=True,
            version=VERSION,
            documents=len(items_of(skill)),
            spec=Spec(settings={"conversation_skill": skill}),
            aggregates=(Aggregate(group=CONVERSATION, metric="acc"),),
            limit=request.limit,
        )
        for skill in SKILLS
        if request.task in (CONVERSATION, f"{CONVERSATION}_{skill}")
    ]


def load(
    name: str,
    spec: Spec,
    *,
    where: str,
    revision: str | None = None,
    cached: bool = False,
) -> Any:
    """A new task object of lm-eval's, which reads the documents and renders the first one.

    Args:
        name: of the task.
        spec: its settings.
        where: its origin, for messages.
        revision: commit of its Hub dataset; None for the latest.
        cached: whether only copies on this machine are read, as the Hub is out of reach.
    """
    import jinja2
    from datasets.exceptions import DatasetsError
    from lm_eval.tasks import TaskManager

    try:
        with hub_offline() if cached else nullcontext():
            settings = spec.merged(functions=True)
            settings.pop("group", None)  # where an old task names its group, it would pass for one
            if revision is not None:
                kwargs = settings.get("dataset_kwargs") or {}
                settings["dataset_kwargs"] = {**kwargs, "revision": revision}
            return TaskManager(include_defaults=False).load([settings])["tasks"][name]
    except OSError as error:
        raise BenchmarkError(
            f"The documents of the benchmark task {name!r} ({where}) cannot be had: {error}. "
            "Connect to the Hugging Face Hub once so that they are cached (without "
            "HF_HUB_OFFLINE; gated data needs HF_TOKEN), or choose a local task."
        ) from error
    except ImportError as error:
        raise BenchmarkError(
            f"The benchmark task {name!r} needs a package that is not installed: {error}. Install "
            "it, or leave the task out."
        ) from error
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        AssertionError,
        jinja2.TemplateError,
        DatasetsError,
    ) as error:
        raise BenchmarkError(
            f"lm-eval cannot load the benchmark task {name!r} ({where}): {type(error).__name__}: "
            f"{error}. Check the task's settings against lm-eval's task guide, and its columns "
            "against the data."
        ) from error


def _checked(
    name: str,
    spec: Spec,
    request: BenchmarkTask,
    revisions: Mapping[str, str],
    *,
    hashes: Sequence[str] = (),
    aggregates: Sequence[Aggregate] = (),
) -> Task:
    """Loads a task with its documents, and checks that it can be run here and paired."""
    settings = spec.merged()
    dataset = _hub_dataset(settings)
    pin = revisions.get(dataset or "")
    revision, problem = (pin, "") if pin else _latest_revision(dataset, settings)
    where = dataset or request.task
    try:
        task = load(name, spec, where=where, revision=revision, cached=bool(problem))
    except BenchmarkError as error:
        if not problem:
            raise
        raise BenchmarkError(
            f"The benchmark task {name!r} cannot be had, and no copy of its documents is on this "
            f"machine. {problem} Connect to the Hugging Face Hub once so that they are cached "
            "(without HF_HUB_OFFLINE), or choose local tasks (`benchmarks: {preset: demo}`)."
        ) from error
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        raise BenchmarkError(
            f"The benchmark task {name!r} runs code that the model wrote, or needs images or "
            "sound; neither is done here. Use lm-eval itself for it."
        )
    metric = _primary_metric(name, task.aggregation(), aggregates)
    if metric is None:
        raise BenchmarkError(
            f"No metric of the benchmark task {name!r} "
            f"({', '.join(task.aggregation()) or 'none listed'}) is a mean over documents, so "
            "base and edited cannot be paired on it. Choose a task with acc or exact_match."
        )
    identity = {
        "lm_eval": version("lm_eval"), "task": name, "files": list(hashes), "revision": revision,
        "changed": spec.settings if spec.path else {},
    }  # fmt: skip
    return Task(
        name=name,
        digest=digest_of(identity),
        metric=metric,
        higher_is_better=bool(task.higher_is_better().get(metric, True)),
        version=str(task.VERSION),
        documents=len(task.eval_docs),
        spec=spec,
        aggregates=tuple(score for score in aggregates if score.metric == metric),
        dataset=dataset,
        revision=revision,
        **request.model_dump(exclude={"task"}),
    )


def _hub_dataset(settings: Mapping[str, Any]) -> str | None:
    """The id of the Hub dataset that a task reads; None where it reads files, or runs code."""
    path = settings.get("dataset_path")
    if not isinstance(path, str) or path in FILE_FORMATS or Path(path).exists():
        return None
    return path


def _latest_revision(dataset: str | None, settings: Mapping[str, Any]) -> tuple[str | None, str]:
    """The commit of a Hub dataset and "", or None and the reason why it is unknown.

    Requested before the documents: this fails at once where the Hub is out of reach, and loading
    only after half a minute of retries.
    """
    if dataset is None:
        return None, ""
    stated = (settings.get("dataset_kwargs") or {}).get("revision")
    try:
        return resolve_revision(dataset, stated), ""
    except PromptError as error:
        return None, str(error)


def _primary_metric(
    name: str, aggregations: Mapping[str, Callable[..., Any]], aggregates: Sequence[Aggregate] = ()
) -> str | None:
    """The metric that is reported, by the rule in the package's docstring; None if none fits."""
    from lm_eval.api.metrics import mean

    means = [metric for metric, aggregate in aggregations.items() if aggregate is mean]
    first = ("acc_norm",) if name in LENGTH_NORMALISED else ()
    order = [metric for metric in (*first, *PREFERRED_METRICS, *means) if metric in means]
    counted = {score.metric for score in aggregates}
    return next((metric for metric in order if metric in counted), next(iter(order), None))
