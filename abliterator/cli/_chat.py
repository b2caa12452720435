"""`abliterator chat`: a conversation with base or edited, or both."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from abliterator.cli._options import computing_arguments
from abliterator.cli._terminal import echo, printable
from abliterator.errors import AbliteratorError, PromptError
from abliterator.files import read_text

if TYPE_CHECKING:
    from abliterator.pipeline import ChatSession, Turns
    from abliterator.record import Side

HELP = """/base, /edited, /both   who answers
/strength 0.5           the edit at half strength (1 as built, 0 the base)
/prompt FILE            ask what the file says
/quit                   end; so does Ctrl-D"""


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
    empty line begins a new conversation; /help lists what else can be typed. Without a terminal,
    every line of stdin is a conversation of one prompt, in UTF-8. Nothing is kept.
    """
    from abliterator import pipeline

    if only_base and compare:
        raise click.UsageError("Give either --base or --compare.")
    sides: tuple[Side, ...] = (
        ("base", "edited") if compare else ("base" if only_base else "edited",)
    )
    options = pipeline.Options(**computing)
    at_terminal = sys.stdin.isatty()
    session = pipeline.open_chat(
        model,
        sides=sides,
        max_new_tokens=max_new_tokens,
        options=options,
        at_run_time=at_terminal,
    )
    for note in session.notes:
        echo(note, err=True)
    if at_terminal:
        names = " and ".join(sides)
        echo(f"{model}: {names}, answers of at most {session.max_new_tokens} tokens.", err=True)
        echo("An empty line begins anew, /help shows more, /quit ends.", err=True)
        converse(session, sides)
        return
    _read_stdin_as("utf-8-sig")  # in every locale
    for number, line in enumerate(sys.stdin, start=1):
        prompt = _prompt(line, f"Line {number} of the standard input")
        for side in session.models if prompt else ():
            print_answer(session, side, prompt, ())


class Conversation:
    """What was said so far with each side, and which sides answer."""

    def __init__(self, session: ChatSession, answering: Sequence[Side]) -> None:
        self.session, self.answering = session, tuple(answering)
        self.before: dict[Side, list[tuple[str, str]]] = {side: [] for side in session.models}

    def obey(self, line: str) -> str:
        """Does what a line that begins with / asks for; returns the prompt that it gives, or "".

        Raises:
            EOFError: for /quit.
            PromptError: for a command that is not known, or cannot be done.
        """
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name == "/quit":
            raise EOFError
        if name in {"/base", "/edited", "/both"}:
            chosen = tuple(self.before) if name == "/both" else (cast("Side", name[1:]),)
            if not set(chosen) <= set(self.before):
                raise PromptError(f"{name[1:]} is not loaded. Give the folder of a build.")
            self.answering = chosen
        elif name == "/strength" and re.fullmatch(r"\d+(\.\d+)?", argument):
            self.session.set_strength(float(argument))
            echo(f"The edit now has strength {float(argument):g}.", err=True)
            self.answering = tuple(side for side in self.before if side in self.answering)
        elif name == "/prompt" and argument:
            return _prompt(read_text(Path(argument).expanduser()).strip(), argument)
        elif name == "/help":
            echo(HELP)
        else:
            raise PromptError(f"{line} is no command. /help lists them.")
        return ""

    def ask(self, prompt: str) -> None:
        """Prints the answers to a prompt; an empty one begins a new conversation."""
        if not prompt:
            for turns in self.before.values():
                turns.clear()
        for side in self.answering if prompt else ():
            answers: list[str] = []
            turns, several = self.before[side], len(self.answering) > 1
            try:
                print_answer(self.session, side, prompt, turns, answers.append, named=several)
            except KeyboardInterrupt:
                echo(" (stopped)")
            turns.append((prompt, "".join(answers)))


def converse(session: ChatSession, answering: Sequence[Side] | None = None) -> None:
    """Holds a conversation with each side, until the end of input or /quit."""
    conversation = Conversation(session, answering or tuple(session.models))
    for prompt in _typed_prompts():
        if not prompt.startswith("/"):
            conversation.ask(prompt)
            continue
        try:
            if given := conversation.obey(prompt):
                conversation.ask(given)
        except EOFError:
            return
        except AbliteratorError as error:
            echo(f"{type(error).__name__}: {error}", err=True)


def print_answer(
    session: ChatSession,
    side: Side,
    prompt: str,
    before: Turns,
    on_answer: Callable[[str], None] = lambda answer: None,
    *,
    named: bool | None = None,
) -> None:
    """Prints one answer as it is generated; calls `on_answer` with it, without its thinking.

    Thinking is dimmed where the terminal can; `named` puts the side before the answer, as it is
    where several are loaded.
    """
    from abliterator.thinking import split_text

    printed = ""

    def print_text(text: str) -> None:
        nonlocal printed
        printed += text
        split = split_text(printed)
        is_thinking = bool(split.thinking.strip()) and not split.answer
        click.secho(printable(text), nl=False, dim=is_thinking or None)
        sys.stdout.flush()

    if len(session.models) > 1 if named is None else named:
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
