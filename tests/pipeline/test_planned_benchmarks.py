"""How many documents and answers of benchmarks a plan counts."""

from pathlib import Path

from abliterator.benchmarks.conversation import SKILLS, items_of, max_new_tokens
from abliterator.pipeline._planning._planned_benchmarks import planned_benchmarks
from abliterator.recipe import Benchmarks

ROOT = Path(__file__).parents[2]


def test_benchmarks_have_the_documents_of_their_files_limits_and_shots():
    tasks = str(ROOT / "recipes/demo/tasks/demo_facts.yaml")
    section = Benchmarks(tasks=(tasks, "arc_easy", "unheard_of"), limit=100, num_fewshot=2)
    facts, arc, other = planned_benchmarks(section, 30)
    assert facts[:2] == (100, 6)
    assert arc[:3] == (100, 4, 120)
    assert other.documents == 100
    (generated,) = planned_benchmarks(
        Benchmarks(tasks=(str(ROOT / "recipes/demo/tasks/demo_declined_facts.yaml"),), limit=None),
        30,
    )
    assert (generated.documents, generated.requests, generated.generated) == (200, 1, 32)
    assert planned_benchmarks(Benchmarks(tasks=()), 30) == []


def test_a_chat_template_counts_where_documents_are_in_it():
    tasks = str(ROOT / "recipes/demo/tasks/demo_facts.yaml")
    (plain,) = planned_benchmarks(Benchmarks(tasks=(tasks,)), 37)
    (in_chat,) = planned_benchmarks(Benchmarks(tasks=(tasks,), chat_template=True), 37)
    assert in_chat.tokens == plain.tokens + 37


def test_the_sizes_of_the_conversation_suite_are_its_own():
    planned = planned_benchmarks(Benchmarks(preset="conversation"), 30)
    (whole,) = planned_benchmarks(Benchmarks(tasks=("conversation",)), 30)
    assert sum(size.documents for size in planned) == whole.documents == 120
    for skill, size in zip(SKILLS, planned, strict=True):
        answers = sum(len(item.prompt.turns) for item in items_of(skill))
        assert size.requests - 1 < answers / size.documents <= size.requests
        assert size.generated == max_new_tokens(skill)
