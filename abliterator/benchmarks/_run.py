"""A saved checkpoint scored on tasks by lm-eval, in this process."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from abliterator.benchmarks._contain import (
    OTHER_SEED,
    lm_eval_contained,
    own_randomness,
    seed_all,
)
from abliterator.benchmarks._scores import DocScore, TaskScores
from abliterator.benchmarks._tasks import Task, load
from abliterator.errors import BenchmarkError


def run_tasks(
    folder: Path,
    tasks: Sequence[Task],
    *,
    batch_size: int,
    limit: int | None = None,
    chat_template: bool = False,
    num_fewshot: int | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, TaskScores]:
    """Score the checkpoint in `folder` on each task with lm-eval, in this process.

    The log-softmax is taken in float32 (in bfloat16 the log-likelihoods collapse to a few values
    and ties decide), the batch size is fixed and nothing is cached. Afterwards the environment and
    the global random states are as before.

    Args:
        folder: a saved checkpoint with its tokenizer.
        tasks: from `resolve_tasks`.
        batch_size: requests a forward pass; use the same for base and edited.
        limit: the first so many documents of each task; None for all.
        chat_template: whether prompts are wrapped in the checkpoint's chat template.
        num_fewshot: worked examples before each question; None for the task's own number, which a
            task that says 0 keeps in any case.
        device: for example "cpu" or "cuda:0".
        dtype: dtype of the weights; None for the stored one.
        trust_remote_code: whether Python files of the checkpoint may run.

    Raises:
        BenchmarkError: if the checkpoint has no chat template though one is wanted, or gives NaN.
    """
    if not tasks:
        return {}
    with lm_eval_contained(), own_randomness():
        from lm_eval.models.huggingface import HFLM

        model = HFLM(
            pretrained=str(folder),
            device=device,
            dtype=dtype or "auto",
            softmax_dtype="float32",
            batch_size=batch_size,
            trust_remote_code=trust_remote_code,
        )
        if chat_template and getattr(model.tokenizer, "chat_template", None) is None:
            raise BenchmarkError(
                f"The benchmarks are to use the chat template, but the tokenizer in {folder} has "
                "none. Set `benchmarks.chat_template: false`, or add a chat_template.jinja to "
                "the model."
            )
        settings = {
            "limit": limit,
            "chat_template": chat_template,
            "batch_size": batch_size,
            "dtype": dtype,
            "lm_eval": version("lm_eval"),
        }
        scores = {task.name: _run_task(model, task, num_fewshot, settings) for task in tasks}
        del model
        _release_memory()
    return scores


def _run_task(
    model: Any, task: Task, num_fewshot: int | None, settings: Mapping[str, Any]
) -> TaskScores:
    from lm_eval.evaluator import evaluate

    loaded = load(task.name, task.spec, where="loaded again")
    # lm-eval's rule: a task that fixes 0 examples keeps them.
    if num_fewshot is not None and loaded.get_config("num_fewshot") != 0:
        loaded.set_config(key="num_fewshot", value=num_fewshot)
    elif loaded.get_config("num_fewshot") is None:
        loaded.set_config(key="num_fewshot", value=0)
    loaded.set_fewshot_seed(seed=OTHER_SEED)
    seed_all()
    results = evaluate(
        model,
        {"tasks": {task.name: loaded}},
        limit=settings["limit"],
        bootstrap_iters=0,  # intervals are ours, of paired differences
        apply_chat_template=settings["chat_template"],
        fewshot_as_multiturn=settings["chat_template"],
    )
    samples = results["samples"][task.name]
    scores = tuple(_doc_score(task, sample) for sample in samples if task.metric in sample)
    return TaskScores(
        task=task.name,
        metric=task.metric,
        n=len({score.doc_id for score in scores}),
        higher_is_better=task.higher_is_better,
        scores=scores,
        settings={
            **settings,
            "num_fewshot": loaded.get_config("num_fewshot"),
            "task_version": task.version,
            "task_digest": task.digest,
        },
    )


def _doc_score(task: Task, sample: Mapping[str, Any]) -> DocScore:
    log_likelihoods = [
        answer[0] for answer in sample["filtered_resps"] if isinstance(answer, tuple)
    ]
    value = float(sample[task.metric])
    if any(math.isnan(number) for number in (*log_likelihoods, value)):
        # argmax would silently take the first NaN for the model's choice.
        raise BenchmarkError(
            f"On document {sample['doc_id']} of the benchmark task {task.name!r} the model gives "
            "NaN instead of a score. The weights or the dtype are broken: try float32, and check "
            "the edit's strength."
        )
    hashes = {key: sample[key] for key in ("doc_hash", "prompt_hash", "target_hash")}
    return DocScore(doc_id=sample["doc_id"], filter=sample["filter"], value=value, **hashes)


def _release_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
