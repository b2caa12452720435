"""How a plan looks in a terminal."""

from __future__ import annotations

import pytest

from abliterator.cli._plan import placed
from abliterator.cli._terminal import wrapped


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_lines_of_a_terminal_are_wrapped_behind_their_labels(columns):
    text = "bytes        read 269.1 MB, edited 73.0 MB, written 272.6 MB; 37.321 GB free" * 3
    lines = wrapped(text, columns).splitlines()
    assert all(len(line) <= columns for line in lines)
    assert all(line.startswith(" " * 13) for line in lines[1:])
    assert " ".join(" ".join(lines).split()) == " ".join(text.split())


def test_a_number_is_not_cut_from_its_unit():
    assert (
        wrapped("time         about 12 min in all", 21)
        == "time         about\n             12 min\n             in all"
    )


def test_a_line_is_continued_behind_its_own_indentation():
    assert wrapped("one\n  two three", 7, indent=0) == "one\n  two\n  three"


def test_accelerators_are_counted_where_they_are_several():
    places = {"cuda:0": 80 * 10**9, "cuda:1": 50 * 10**9, "cpu": 11 * 10**9, "disk": 10**9}
    where = {"places": places, "devices": 4, "free": dict.fromkeys(places, 90 * 10**9)}
    assert placed(where) == (
        "130.000 GB on 2 of 4 accelerators (cuda:0, cuda:1), 11.000 GB in host memory "
        "(90.000 GB free), 1.000 GB on disk"
    )
