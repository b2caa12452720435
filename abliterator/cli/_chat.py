"""`abliterator chat`: a conversation with base or edited, or both."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from abliterator.cli._options import computing_arguments
from abliterator.cli._terminal import echo
from abliterator.errors import PromptError

if TYPE_CHECKING:
    from abliterator.pipeline import ChatSession, Turns
    from abliterator.record import Side


@click.command(short_help="Talk to base and edited.")
@click.argument("model")
@click.option("--base", "only_base", is_flag=True, help="Talk to the base in place of the edited.")
@click.option("--compare", is_flag=True, help="Let both answer, first the base.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Tokens of an answer, at most.")
@computing_arguments
def chat(
    model: str, only_base: bool, compare: bool, max_new_tokens: int | None, **computing: Any
) -> None:
    """Talk to MODEL: the folder of a build, a checkpoint, or a Hub id.

    Template, system prompt, stop tokens and length are the recipe's, and answers are greedy, as
    those that were measured. Ctrl-C stops an answer, Ctrl-D (on Windows Ctrl-Z and Enter) ends, an
    empty line begins a new conversation. Without a terminal, every line of stdin is a conversation
    of one prompt, in UTF-8. Nothing is kept.
    """
    from abliterator import pipeline

    if only_base and compare:
        raise click.UsageError("Give either --base or --compare.")
    sides: tuple[Side, ...] = (
        ("base", "edited") if compare else ("base" if only_base else "edited",)
    )
    options = pipeline.Options(**computing)
    session = pipeline.open_chat(model, sides=sides, max_new_tokens=max_new_tokens, options=options)
    for note in session.notes:
        echo(note, err=True)
    if sys.stdin.isatty():
        converse(session)
        return
    _read_stdin_as("utf-8-sig")  # in every locale
    for number, line in enumerate(sys.stdin, start=1):
        prompt = _prompt(line, f"Line {number} of the standard input")
        for side in session.models if prompt else ():
            print_answer(session, side, prompt, ())


def converse(session: ChatSession) -> None:
    """Holds a conversation with each side, until the end of input."""
    before: dict[Side, list[tuple[str, str]]] = {side: [] for side in session.models}
    for prompt in _typed_prompts():
        for side, turns in before.items():
            if not prompt:
                turns.clear()
                continue
            answers: list[str] = []
            try:
                print_answer(session, side, prompt, turns, answers.append)
            except KeyboardInterrupt:
                echo(" (stopped)")
            turns.append((prompt, "".join(answers)))


def print_answer(
    session: ChatSession,
    side: Side,
    prompt: str,
    before: Turns,
    on_answer: Callable[[str], None] = lambda answer: None,
) -> None:
    """Prints one answer as it is generated; calls `on_answer` with it, without its thinking."""

    def print_text(text: str) -> None:
        echo(text, nl=False)
        sys.stdout.flush()

    if len(session.models) > 1:
        click.secho(f"{side}: ", nl=False, bold=True)
    session.answer(side, prompt, before, print_text, on_answer)
    echo()


def _prompt(line: str, where: str) -> str:
    from abliterator.prompts import as_prompt

    if any("\udc80" <= character <= "\udcff" for character in line):  # bytes that no text has
        raise PromptError(f"{where} is not UTF-8 text. Convert it, as with `iconv -t UTF-8`.")
    return as_prompt(line, where)


def _read_stdin_as(encoding: str | None) -> None:
    """Sets the encoding of stdin; None keeps the terminal's. Bytes that are no text are kept."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding=encoding, errors="surrogateescape")


def _typed_prompts() -> Iterator[str]:
    """The lines that are typed, without those that Ctrl-C stops or that are not text."""
    _read_stdin_as(None)
    with suppress(ImportError):
        import readline  # noqa: F401  lines can then be edited
    while True:
        try:
            yield _prompt(input("> "), "What was typed")
        except PromptError as error:
            echo(f"{type(error).__name__}: {error}", err=True)
        except KeyboardInterrupt:
            echo()
        except EOFError:
            echo()
            return
