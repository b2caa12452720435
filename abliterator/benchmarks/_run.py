"""A saved checkpoint scored on tasks by lm-eval; runs in a process of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from abliterator.benchmarks._chat import ChatRenderer
from abliterator.benchmarks._isolation import OTHER_SEED, lm_eval_isolated, seed_all
from abliterator.benchmarks._scores import DocScore, TaskScores
from abliterator.benchmarks._settings import RunSettings, open_model
from abliterator.benchmarks._tasks import Task, load
from abliterator.errors import BenchmarkError
from abliterator.record import Side


def run_tasks(
    folder: Path,
    tasks: Sequence[Task],
    settings: RunSettings,
    *,
    side: Side = "base",
    on_task: Callable[[TaskScores], None] | None = None,
) -> dict[str, TaskScores]:
    """Scores the checkpoint in `folder` on each task with lm-eval.

    The log-softmax is computed in float32, the batch size is fixed and nothing is cached. The
    global random states are lm-eval's afterwards: `measure_sides` runs this in a child process.

    Args:
        folder: a saved checkpoint with its tokenizer.
        tasks: from `resolve_tasks`; limit, examples and chat template of a task go before those of
            the settings.
        settings: how they are run.
        side: selects the server, where servers are the engine.
        on_task: called with the scores of each task when it is done.

    Raises:
        BenchmarkError: if the checkpoint has no chat template though one is wanted, or gives NaN.
    """
    if not tasks:
        return {}
    scores = {}
    with lm_eval_isolated():
        model = open_model(folder, settings, side=side)
        chat = None
        if any(settings.of(task).section.chat_template for task in tasks):
            chat = ChatRenderer.of(folder, settings)
            model.apply_chat_template = chat.render  # whichever engine, the same text
        for task in tasks:
            scores[task.name] = _run_task(model, task, settings.of(task), chat)
            if on_task:
                on_task(scores[task.name])
    return scores


def _run_task(
    model: Any, task: Task, settings: RunSettings, chat: ChatRenderer | None
) -> TaskScores:
    from lm_eval.evaluator import evaluate

    section = settings.section
    chat = chat if section.chat_template else None
    only_cached = task.dataset is not None and task.revision is None
    loaded = load(
        task.name, task.spec, where="loaded again", revision=task.revision, cached=only_cached
    )
    _set_fewshot(loaded, section.num_fewshot)
    seed_all()
    results = evaluate(
        model,
        {"tasks": {task.name: loaded}},
        limit=section.limit,
        bootstrap_iters=0,  # intervals are ours, of paired differences
        apply_chat_template=chat is not None,
        fewshot_as_multiturn=chat is not None,
        system_instruction=chat.system if chat else None,
    )
    samples = results["samples"][task.name]
    scores = tuple(
        _doc_score(model, loaded, task, sample) for sample in samples if task.metric in sample
    )
    return TaskScores(
        task=task.name,
        metric=task.metric,
        n=len({score.doc_id for score in scores}),
        asked=min(section.limit or task.documents, task.documents),
        higher_is_better=task.higher_is_better,
        scores=scores,
        aggregates=task.aggregates,
        settings={
            "limit": section.limit,
            "chat_template": chat is not None,
            **(chat.settings if chat else {}),
            "batch_size": section.batch_size,
            "dtype": settings.dtype,
            "engine": section.engine.kind,
            "lm_eval": version("lm_eval"),
            "num_fewshot": loaded.get_config("num_fewshot"),
            "task_version": task.version,
            "task_digest": task.digest,
            "data_revision": task.revision,
        },
    )


def _set_fewshot(loaded: Any, num_fewshot: int | None) -> None:
    # lm-eval's rule: a task that fixes 0 examples keeps them.
    if num_fewshot is not None and loaded.get_config("num_fewshot") != 0:
        loaded.set_config(key="num_fewshot", value=num_fewshot)
    elif loaded.get_config("num_fewshot") is None:
        loaded.set_config(key="num_fewshot", value=0)
    loaded.set_fewshot_seed(seed=OTHER_SEED)


def _doc_score(model: Any, loaded: Any, task: Task, sample: Mapping[str, Any]) -> DocScore:
    log_likelihoods = [
        answer[0] for answer in sample["filtered_resps"] if isinstance(answer, (tuple, list))
    ]
    value = float(sample[task.metric])
    if any(math.isnan(number) for number in (*log_likelihoods, value)):
        # argmax would silently return the first NaN as the model's choice
        raise BenchmarkError(
            f"On document {sample['doc_id']} of the benchmark task {task.name!r} the model gives "
            "NaN instead of a score. The weights or the dtype are broken: try float32, and check "
            "the edit's strength."
        )
    hashes = {key: sample[key] for key in ("doc_hash", "prompt_hash", "target_hash")}
    return DocScore(
        doc_id=sample["doc_id"],
        filter=sample["filter"],
        value=value,
        gold_loglik=_gold_loglik(loaded, sample, log_likelihoods),
        confidence=_confidence(loaded, task, log_likelihoods),
        **hashes,
        **_answer_flaws(model, loaded, sample),
    )


def _confidence(loaded: Any, task: Task, log_likelihoods: list[float]) -> float | None:
    """Probability of the likeliest choice among all; None where not the likeliest is scored."""
    if loaded.OUTPUT_TYPE != "multiple_choice" or task.metric != "acc" or not log_likelihoods:
        return None
    highest = max(log_likelihoods)
    return 1 / sum(math.exp(value - highest) for value in log_likelihoods)


def _gold_loglik(
    loaded: Any, sample: Mapping[str, Any], log_likelihoods: list[float]
) -> float | None:
    """Log-likelihood of the right answer; of several right ones, that of the likeliest."""
    if loaded.OUTPUT_TYPE == "loglikelihood":
        return log_likelihoods[0]
    if loaded.OUTPUT_TYPE != "multiple_choice":
        return None
    doc = sample["doc"]
    # a task such as winogrande chooses among contexts, and says in doc_to_text which is right
    several_contexts = getattr(loaded, "multiple_input", 0)
    gold = loaded.doc_to_text(doc) if several_contexts else loaded.doc_to_target(doc)
    if isinstance(gold, str):
        choices = loaded.doc_to_choice(doc)
        gold = choices.index(gold) if gold in choices else None
    correct = [i for i in (gold if isinstance(gold, list) else [gold]) if isinstance(i, int)]
    likelihoods = [log_likelihoods[i] for i in correct if 0 <= i < len(log_likelihoods)]
    return max(likelihoods, default=None)


def _answer_flaws(model: Any, loaded: Any, sample: Mapping[str, Any]) -> dict[str, bool]:
    """Whether a generated answer is empty, and whether it was cut.

    lm-eval keeps the text only, so its tokens are counted again: two fewer than the limit still
    count as cut, since joining pieces of text can merge tokens.
    """
    if loaded.OUTPUT_TYPE != "generate_until":
        return {}
    text = str(sample["resps"][0][0])
    limit = _generation_limit(model, sample["arguments"])
    encode = getattr(model, "tok_encode", None)
    flaws = {"empty": not text.strip()}
    if limit and encode:
        slack = 2 if limit > 20 else 0
        flaws["truncated"] = len(encode(text, add_special_tokens=False)) >= limit - slack
    return flaws


def _generation_limit(model: Any, arguments: Any) -> int | None:
    first = arguments[0] if isinstance(arguments, (list, tuple)) else arguments["gen_args_0"]
    kwargs = first[1] if isinstance(first, (list, tuple)) else first.get("arg_1")
    stated = kwargs.get("max_gen_toks") if isinstance(kwargs, dict) else None
    # lm-eval's client for servers has no public name for it
    limit: int | None = stated or getattr(model, "max_gen_toks", None) or model._max_gen_toks
    return limit
