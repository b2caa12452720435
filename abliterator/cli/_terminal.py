"""Output of the command line: escaped text, results, and progress bars."""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import click

from abliterator.tables import cell

if TYPE_CHECKING:
    from abliterator.pipeline import Advance

T = TypeVar("T")

LABELS = 13  # columns of the labels before lines
_QUANTITY = re.compile(r"(\d) (bytes|kB|MB|GB|s|min|h)\b")

_WIDE = 100  # columns from which a bar is drawn

QUIET = "abliterator.quiet"  # in the context of a command

# Control characters but for line feed and tab, separators of lines and paragraphs, overrides of the
# writing direction, and halves of surrogate pairs.
_ACTIVE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069"
    "\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""The text with characters that a terminal would act on as `\uXXXX`, which JSON reads too."""
    return _ACTIVE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def echo(text: object = "", *, err: bool = False, nl: bool = True) -> None:
    """Prints a text, made printable, to stdout or stderr."""
    click.echo(printable(str(text)), err=err, nl=nl)


def byte_size(count: int) -> str:
    """A number of bytes as text, to three digits or more."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.{3 if unit > 10**6 else 1}f} {name}"
    return f"{count} bytes"


def duration(seconds: float) -> str:
    """Seconds as text with the two largest units: 59 s, 3 min 20 s, 2 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def short(text: str, indent: int) -> str:
    """The text on one line, cut to what fits beside `indent` columns."""
    width = shutil.get_terminal_size((100, 24)).columns - indent
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."


def wrapped(text: str, columns: int, *, indent: int = LABELS) -> str:
    """The text with lines of at most `columns` characters, continued behind `indent` of them.

    With 0, a line is continued behind its own indentation.
    """
    lines = (
        textwrap.wrap(
            _QUANTITY.sub("\\1\u00a0\\2", line),  # a number stays with its unit
            columns,
            subsequent_indent=" " * (indent or len(line) - len(line.lstrip())),
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in text.splitlines()
    )
    return "\n".join("\n".join(parts) for parts in lines).replace("\u00a0", " ")


def fitted(text: str, *, err: bool = False, indent: int = LABELS) -> str:
    """The text, wrapped to the terminal's width where stdout (or stderr) is a terminal."""
    if not (sys.stderr if err else sys.stdout).isatty():
        return text
    return wrapped(text, shutil.get_terminal_size().columns, indent=indent)


def render(name: str, /, **values: Any) -> str:
    """The text of one of `templates`, which are what a user reads."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("abliterator", "cli/templates"),
        autoescape=False,  # that would be HTML's escape
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "cell": cell,
        "duration": duration,
        "form": format,
        "listed": lambda counts: ", ".join(f"{n} {name}" for name, n in counts.items()),
        "short": short,
        "rate": lambda value: cell(value, absent="n/a"),
        "sets_of": _sets_of,
        "size": byte_size,
    }
    return environment.get_template(f"{name}.txt.jinja").render(values).rstrip("\n")


def _sets_of(counts: Mapping[str, Mapping[str, int]] | None, use: str) -> str:
    """The sets of one use and their prompts: "96 target, 96 contrast"."""
    suffix = f", {use}"
    return ", ".join(
        f"{of_set['prompts']} {name.removesuffix(suffix)}"
        for name, of_set in (counts or {}).items()
        if name.endswith(suffix)
    )


def show(result: T, as_text: Callable[[T], str], *, as_json: bool) -> None:
    """Prints a result on stdout, as text for people or as JSON.

    JSON is ASCII, which is the same in every encoding of stdout.
    """
    from pydantic_core import to_jsonable_python

    if as_json:
        echo(json.dumps(to_jsonable_python(result), indent=1))
    else:
        echo(as_text(result).removesuffix("\n"))


def is_quiet() -> bool:
    """Whether the command line has `--quiet`."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(QUIET))


class Bars:
    """Draws the pipeline's progress on stderr.

    Where stderr is a terminal, a bar has its rate, the time left, and the time since the command
    began; elsewhere only the lines of stages and notes are printed. With `--quiet` nothing is.
    """

    def __init__(self, stages: Sequence[str] = (), *, expected: float | None = None) -> None:
        """Takes the names of all stages in order, and about the most seconds that they take."""
        self._stages, self._expected = list(stages), expected
        self._start = perf_counter()

    def stage(self, name: str, *, done: bool) -> None:
        """Prints one line a stage, with its place among all."""
        place = ""
        if name in self._stages:
            place = f"[{self._stages.index(name) + 1}/{len(self._stages)}] "
        line = f"{place}{name}{' (done before)' if done else ''}"
        if not is_quiet():
            click.secho(printable(line), err=True, bold=not done or None, dim=done or None)

    @contextmanager
    def bar(self, label: str, total: int, *, unit: str = "") -> Iterator[Advance]:
        """A tqdm bar that vanishes when it is full; none where stderr is a file."""
        from tqdm import tqdm

        disable = True if is_quiet() else None  # None: where stderr is no terminal
        width = shutil.get_terminal_size((100, 24)).columns
        with tqdm(
            total=total or None,
            desc=f"{'  ' if width >= _WIDE else ''}{printable(label)}",
            leave=False,
            file=sys.stderr,
            disable=disable,
            unit=unit or "it",
            unit_scale=bool(unit),
            bar_format=self._format(total, width, is_moving=False),
            ncols=width,
        ) as bar:

            def advance(amount: int, *, status: str = "") -> None:
                bar.bar_format = self._format(total, width, printable(status))
                bar.update(amount)

            yield advance

    def _format(self, total: int, width: int, status: str = "", *, is_moving: bool = True) -> str:
        """Tqdm's template of a bar: amount, rate, time left; time since the start, and at most."""
        elapsed = perf_counter() - self._start
        within = self._expected is not None and elapsed < self._expected  # else it was wrong
        text = f"{duration(elapsed)} "
        text += f"of up to {duration(self._expected or 0)}" if within else "in all"
        if not total:
            return "{desc}, {elapsed}; " + text
        text += f"; {status}" if status else ""
        speed = "{rate_fmt}, {remaining} left; " if is_moving else "...; "
        template = "{desc} {bar:12} {n_fmt}/{total_fmt}, " + speed
        if width < _WIDE:  # room for a status in 80 columns
            template = "{desc} {n_fmt}/{total_fmt} " + speed.replace(",", "")
        return template + text.replace("{", "{{").replace("}", "}}")

    def note(self, text: str) -> None:
        """Prints a note on a line of its own."""
        if not is_quiet():
            echo(text, err=True)
