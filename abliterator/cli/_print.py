"""Text on a terminal: whatever a model, a file name or a server says, it is shown, never obeyed."""

from __future__ import annotations

import re

import click

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
