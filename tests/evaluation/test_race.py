"""Races: which candidates answer all prompts, whatever they answer."""

from dataclasses import dataclass
from statistics import mean

from hypothesis import given
from hypothesis import strategies as st

from abliterator.evaluation import WholeFront, race
from abliterator.recipe import Selection

PROMPTS = 12
RUNGS = Selection(rungs=(2, 5))


@dataclass(frozen=True)
class Grades:
    """Judged answers without text."""

    values: tuple[float, ...]

    def __add__(self, other):
        return Grades(self.values + other.values)

    @property
    def mean_product(self):
        return mean(self.values)


def run(products, kl, objective, settings=RUNGS):
    """The race of candidates with these products on each prompt, and how often each was asked."""
    asked = [[0] * PROMPTS for _ in products]

    def judge(chosen, prompts):
        for i in chosen:
            for prompt in prompts:
                asked[i][prompt] += 1
        return [Grades(tuple(products[i][prompt] for prompt in prompts)) for i in chosen]

    entrants = race(kl, judge, settings, prompts=PROMPTS, seed=0, objective=objective)
    return entrants, asked


CANDIDATES = st.lists(
    st.tuples(
        st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=PROMPTS, max_size=PROMPTS),
        st.integers(0, 6).map(lambda i: i / 60),
    ),
    min_size=1,
    max_size=9,
)


@given(CANDIDATES)
def test_what_nothing_beats_answers_all_prompts_and_no_prompt_twice(candidates):
    products, kl = zip(*candidates, strict=True)
    entrants, asked = run(products, kl, WholeFront())
    assert sorted(e.index for e in entrants) == list(range(len(candidates)))
    finished = [e for e in entrants if e.prompts[-1] == PROMPTS]
    assert entrants[: len(finished)] == finished
    for entrant in entrants:
        assert max(asked[entrant.index]) == 1
        assert sum(asked[entrant.index]) == entrant.prompts[-1] == len(entrant.judged[-1].values)
        if entrant not in finished:
            assert any(other.beats(entrant) for other in finished)


def test_of_candidates_on_one_front_none_drops_out_and_beaten_ones_do():
    steady = [[share] * PROMPTS for share in (1.0, 0.5, 0.0)]
    entrants, _ = run(steady, [0.3, 0.2, 0.1], WholeFront())
    assert [e.index for e in entrants] == [0, 1, 2]
    assert {e.prompts for e in entrants} == {(2, 5, 12)}
    entrants, _ = run(steady, [0.1, 0.2, 0.3], WholeFront())
    assert [e.prompts for e in entrants] == [(2, 5, 12), (2, 5), (2,)]


def test_what_is_beaten_within_the_noise_of_few_prompts_stays():
    """A half less on 2 prompts is noise, on 5 it is not."""
    steady = [[share] * PROMPTS for share in (1.0, 0.5, 0.5)]
    entrants, _ = run(steady, [0.1, 0.2, 0.3], WholeFront())
    assert [e.prompts for e in entrants] == [(2, 5, 12), (2, 5), (2, 5)]


def test_the_highest_product_wins_whatever_its_divergence_unless_a_front_is_looked_for():
    steady = [[share] * PROMPTS for share in (1.0, 0.5, 0.0)]
    entrants, _ = run(steady, [0.3, 0.2, 0.1], None)
    assert [e.prompts[-1] for e in entrants] == [12, 5, 2]
