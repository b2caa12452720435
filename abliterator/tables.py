"""Tables of text cells, as Markdown and for a terminal.

What the cells say is not known here.

    terminal_table([["layer", "KL"], ["8", cell(0.03125)]])
    markdown_table(["layer", "KL"], [["8", cell(None)]])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal


def cell(value: object, form: str = ".3f", *, absent: str = "not measured") -> str:
    """A number or an `Estimate`, formatted as `form` has it; `absent` for None."""
    return absent if value is None else format(value, form)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table without a line end; cells may hold no bare `|`."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def terminal_table(rows: Sequence[Sequence[str]], align: Literal["<", ">"] = "<") -> list[str]:
    """Lines with columns two spaces apart, without spaces at the end.

    Args:
        rows: cells, the head first; all rows have as many.
        align: cells to the left ("<") or to the right (">") of their column.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{text:{align}{width}}" for text, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
