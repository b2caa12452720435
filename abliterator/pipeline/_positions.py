"""The token ids that a capture reads for each position, and where in them the position is.

A residual depends on no later token, so the residual at a token within a prompt is that at the last
token of the prompt up to there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from abliterator.errors import DirectionError
from abliterator.files import Journal
from abliterator.pipeline._kept import KeptAnswers, partial_file
from abliterator.pipeline._run import Run

if TYPE_CHECKING:
    from abliterator.directions import Position
    from abliterator.engines import Engine
    from abliterator.prompts import Prompt

MIN_PROMPTS = 2  # of each kind: a mean of fewer has no spread


class Reading(NamedTuple):
    """What one pass over a prompt set reads.

    Attributes:
        positions: that it captures, as the recipe names them.
        offsets: the same, counted from the end of the token ids.
        rows: index in the set of each prompt that is read.
        token_ids: of those prompts.
    """

    positions: tuple[Position, ...]
    offsets: tuple[int, ...]
    rows: Sequence[int]
    token_ids: Sequence[Sequence[int]]


def captured_positions(run: Run, engine: Engine) -> tuple[Position, ...]:
    """The positions that are captured, -1 first.

    Raises:
        DirectionError: for a position that the chat template does not have.
    """
    from abliterator.directions import position_order
    from abliterator.model import template_tail

    chat, positions = run.recipe.chat, run.recipe.directions.positions
    tail = template_tail(engine.tokenizer, system=chat.system, template_kwargs=chat.template_kwargs)
    layout = f"The chat template puts {len(tail)} tokens after every prompt"
    if not positions:
        if not tail:
            raise DirectionError(
                f"{layout}, so there is no position to sweep. Leave `position: -1`."
            )
        return tuple(range(-1, -len(tail) - 1, -1))
    for position in positions:
        if isinstance(position, int) and position < -len(tail) and position != -1:
            raise DirectionError(
                f"{layout}, so `directions.position` can be -1 to {-len(tail)}; it is {position}. "
                "The last token of the prompt's own text is `instruction`."
            )
    return tuple(sorted(positions, key=position_order))


def readings(
    run: Run, engine: Engine, name: str, prompts: Sequence[Prompt], positions: Sequence[Position]
) -> Iterator[Reading]:
    """The passes that capture `positions` of a prompt set.

    Raises:
        DirectionError: if the base thinks about too few of the prompts, or not to an end.
    """
    numbers = tuple(position for position in positions if isinstance(position, int))
    rows = range(len(prompts))
    if numbers:
        yield Reading(numbers, numbers, rows, run.render(engine, prompts, name=name).token_ids)
    if "instruction" in positions:
        yield Reading(("instruction",), (-1,), rows, _instructions(run, engine, name, prompts))
    if "after_thinking" in positions:
        behind = _behind_thinking(run, engine, name, prompts)
        yield Reading(("after_thinking",), (-1,), list(behind), list(behind.values()))


def _instructions(
    run: Run, engine: Engine, name: str, prompts: Sequence[Prompt]
) -> list[list[int]]:
    from abliterator.model import up_to_instruction

    run.render(engine, prompts, name=name)  # checks them against the limits of the model
    chat = run.recipe.chat
    return up_to_instruction(
        engine.tokenizer, prompts, system=chat.system, template_kwargs=chat.template_kwargs
    )


def _behind_thinking(
    run: Run, engine: Engine, name: str, prompts: Sequence[Prompt]
) -> dict[int, tuple[int, ...]]:
    """By index, each prompt with the base's thinking about it, up to where its answer begins.

    Where the template closes the thinking itself, the answer begins behind the prompt.
    """
    from abliterator.prompts import readable
    from abliterator.thinking import Splitter

    budget = run.recipe.rollouts.most_thinking
    token_ids = run.render(engine, prompts, name=name, max_new_tokens=budget).token_ids
    key = [name, budget, run.base_digest(), run.section("chat"), [*map(readable, prompts)]]
    journal = Journal(partial_file(run, "capture", f"thoughts-{name}.jsonl", key))
    answered = KeptAnswers(journal, name)
    with run.progress.bar(f"thinking, {name}", len(prompts) - len(answered)) as advance:
        answers = engine.answers(
            token_ids,
            max_new_tokens=budget,
            batch_size=run.batch_size,
            answered=answered,
            on_batch=advance,
        )
    splitter, behind = Splitter(engine.tokenizer), {}
    for index, (ids, answer) in enumerate(zip(token_ids, answers, strict=True)):
        if 0 < answer.start_token < len(answer.token_ids):
            behind[index] = (*ids, *answer.token_ids[: answer.start_token])
        elif not answer.start_token and splitter.opened_by(ids).is_closed:
            behind[index] = tuple(ids)
    _note_left_out(run, name, len(behind), len(prompts), budget)
    return behind


def _note_left_out(run: Run, name: str, n_behind: int, n: int, budget: int) -> None:
    within = f"thinks and comes to an answer within {budget} tokens on {n_behind} of the {n}"
    if n_behind < MIN_PROMPTS:
        raise DirectionError(
            f"The base {within} {name} prompts; `position: after_thinking` needs at least "
            f"{MIN_PROMPTS}. Raise `rollouts.thinking_tokens`, switch its thinking on in "
            "`chat.template_kwargs`, or take another position."
        )
    if n_behind < n:
        run.progress.note(f"The base {within} {name} prompts; the others have no `after_thinking`.")
