"""Two sides: pairs, deltas, flips, and rows of groups."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from abliterator.benchmarks import Aggregate, TaskScores, compare_tasks
from abliterator.errors import BenchmarkError
from tests.benchmarks.toy import YES, run, scored


def test_a_model_against_itself_has_deltas_of_zero(plain, tasks, scores):
    for result in compare_tasks(scores, run(plain, tasks, batch_size=7)).values():
        assert (result.n, result.delta.value, result.delta.n) == (30, 0.0, 30)
        assert result.base == result.edited
        assert result.smallest_detectable is None  # no difference, so no idea of its spread


@pytest.mark.parametrize("chat_template", [False, True])
def test_models_that_differ_by_construction_show_the_right_sign(
    says_no, says_yes, tasks, chat_template
):
    no, yes = (
        run(folder, tasks, batch_size=4, chat_template=chat_template)
        for folder in (says_no, says_yes)
    )
    results = compare_tasks(no, yes)
    assert set(results) == {"toy_choice", "toy_say,first", "toy_say,raw"}
    for key in ("toy_choice", "toy_say,first"):
        result = results[key]
        assert (result.base.value, result.edited.value) == (1 - YES / 30, YES / 30)
        assert result.delta.value == pytest.approx(2 * YES / 30 - 1)
        assert result.base.low < result.base.value < result.base.high
        assert result.smallest_detectable > 0
    assert results["toy_say,raw"].edited.value == 0  # "yes yes yes" is not "yes"
    back = compare_tasks(yes, no)["toy_choice"]
    assert back.delta.value == -results["toy_choice"].delta.value


def edit_first(scores: TaskScores, **changes) -> TaskScores:
    first, *rest = scores.scores
    return scores.model_copy(update={"scores": (first.model_copy(update=changes), *rest)})


def test_runs_on_other_documents_prompts_or_settings_are_not_compared(scores):
    base = {"toy_choice": scores["toy_choice"]}

    def compared(edited):
        return compare_tasks(base, {"toy_choice": edited})

    choice = scores["toy_choice"]
    for field in ("doc_hash", "prompt_hash", "target_hash"):
        with pytest.raises(BenchmarkError, match=f"Document 0 .* another {field}"):
            compared(edit_first(choice, **{field: "0" * 64}))
    with pytest.raises(
        BenchmarkError, match="30 scored documents on base and 29 on edited; document 0"
    ):
        compared(choice.model_copy(update={"scores": choice.scores[1:]}))
    with pytest.raises(BenchmarkError, match="batch_size: 7 and 8"):
        compared(choice.model_copy(update={"settings": {**choice.settings, "batch_size": 8}}))
    with pytest.raises(BenchmarkError, match="different tasks"):
        compare_tasks(base, scores)
    assert (
        compared(edit_first(choice, value=1 - choice.scores[0].value))["toy_choice"].delta.value
        != 0
    )


def test_pairs_are_joined_on_the_document_not_on_the_order(scores):
    choice = scores["toy_choice"]
    turned = choice.model_copy(update={"scores": choice.scores[::-1]})
    assert compare_tasks({"t": choice}, {"t": turned}) == compare_tasks(
        {"t": choice}, {"t": choice}
    )


def test_flips_and_their_p_value_are_mcnemars():
    base, edited = [1.0] * 12 + [0.0] * 8, [1.0] * 2 + [0.0] * 17 + [1.0]
    result = compare_tasks({"t": scored(base)}, {"t": scored(edited)})["t"]
    assert (result.lost, result.gained) == (10, 1)
    tail = sum(math.comb(11, k) for k in (0, 1))
    assert result.p_value == pytest.approx(2 * tail / 2**11)
    assert result.p_holm == result.p_value  # alone, nothing to correct for


def test_holm_by_hand():
    def flips(lost):
        return [1.0] * 20, [0.0] * lost + [1.0] * (20 - lost)

    sides = {name: flips(lost) for name, lost in {"a": 8, "b": 6, "c": 1, "d": 5}.items()}
    base = {name: scored(before, task=name) for name, (before, _) in sides.items()}
    edited = {name: scored(after, task=name) for name, (_, after) in sides.items()}
    results = compare_tasks(base, edited)
    p = {name: 2 / 2**lost for name, lost in {"a": 8, "b": 6, "d": 5}.items()} | {"c": 1.0}
    assert {name: result.p_value for name, result in results.items()} == pytest.approx(p)
    expected = {"a": 4 * p["a"], "b": 3 * p["b"], "d": max(3 * p["b"], 2 * p["d"]), "c": 1.0}
    assert {name: result.p_holm for name, result in results.items()} == pytest.approx(expected)


def test_the_gold_answers_likelihood_moves_before_the_choice_does():
    base = scored([1.0, 0.0], gold=[-1.0, -2.0])
    edited = scored([1.0, 0.0], gold=[-1.5, -2.1])
    result = compare_tasks({"t": base}, {"t": edited})["t"]
    assert (result.delta.value, result.p_value) == (0, 1)
    assert result.gold_loglik.value == pytest.approx(-0.3)
    assert result.gold_loglik.n == 2


def test_values_that_are_no_right_or_wrong_get_a_sign_flip_test():
    result = compare_tasks({"t": scored([0.5, 0.4, 1])}, {"t": scored([0.25, 0.3, 0])})["t"]
    assert (result.gained, result.lost) == (None, None)
    assert result.p_value == pytest.approx(2 / 2**3)


def test_a_group_has_a_row_for_each_task_and_one_for_all_their_documents():
    group = (Aggregate(group="g", metric="acc"),)
    base = {name: scored([1, 1], task=name, aggregates=group) for name in ("a", "b")}
    edited = {
        "a": scored([1, 0], task="a", aggregates=group),
        "b": scored([0, 0], task="b", aggregates=group),
    }
    results = compare_tasks(base, edited)
    assert [(name, r.n, r.delta.value, r.lost) for name, r in results.items()] == [
        ("g", 4, -0.75, 3),
        ("a", 2, -0.5, 1),
        ("b", 2, -1.0, 2),
    ]
    assert (results["g"].settings["tasks"], results["g"].settings["mean_over"]) == (2, "documents")
    assert results["g"].delta.low < -0.75 < results["g"].delta.high


def test_a_group_that_counts_tasks_alike_gives_the_mean_of_their_means():
    group = (Aggregate(group="g", metric="acc", by_size=False),)
    sides = {"a": ([1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]), "b": ([1, 0], [0, 0])}
    base, edited = (
        {
            name: scored(values[i], task=name, aggregates=group, gold=[float(i)] * len(values[i]))
            for name, values in sides.items()
        }
        for i in (0, 1)
    )
    result = compare_tasks(base, edited)["g"]
    assert result.n == 8
    assert result.base.value == pytest.approx((4 / 6 + 1 / 2) / 2)
    assert result.delta.value == pytest.approx((-1 / 6 - 1 / 2) / 2)
    assert result.gold_loglik.value == pytest.approx(1)


def test_a_group_counts_the_filters_and_the_metric_that_it_names():
    only = (
        Aggregate(group="g", metric="acc", filters=("strict",)),
        Aggregate(group="g", metric="acc", filters=None),
    )
    both = scored([1, 1], aggregates=only[:1], filter="strict")
    lax = scored([0, 1], filter="lax").scores
    side = {"t": both.model_copy(update={"scores": (*both.scores, *lax)})}
    assert list(compare_tasks(side, side)) == ["g", "t,strict", "t,lax"]
    side = {"t": side["t"].model_copy(update={"aggregates": only[1:]})}
    assert list(compare_tasks(side, side)) == ["g,strict", "g,lax", "t,strict", "t,lax"]


@pytest.mark.parametrize("by_size", [True, False])
def test_the_mean_of_a_group_is_lm_evals(by_size, monkeypatch):
    """lm-eval's own group is the oracle; it has no paired difference, so ours are computed here."""
    from lm_eval.api.group import Group

    values = {"a": [1, 1, 1, 0, 0, 0, 1], "b": [1, 0], "c": [0.25, 0.5, 1]}
    metric = {"metric": "acc", "weight_by_size": by_size}
    theirs = Group.from_config({"group": "g", "aggregate_metric_list": [metric]})
    monkeypatch.setattr(
        theirs, "get_all_tasks", lambda: [SimpleNamespace(task_name=n) for n in values]
    )
    means = {
        name: {"acc,none": sum(v) / len(v), "sample_len": len(v)} for name, v in values.items()
    }
    group = (Aggregate(group="g", metric="acc", by_size=by_size),)
    side = {name: scored(v, task=name, aggregates=group) for name, v in values.items()}
    ours = compare_tasks(side, side)["g"].base.value
    assert ours == pytest.approx(theirs.aggregate(means)["acc,none"])
