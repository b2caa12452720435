"""Patterns that a checkpoint brings: as `re` matches them, and none that takes for ever."""

import re

import pytest

from abliterator.errors import UnsupportedModel
from abliterator.formats._patterns import matches

NAME = "model.layers.0.mlp.down_proj"
ENDLESS = r"(?:\w|\w\w|\.)+[^\w.]"  # tries every way to cut a name into ones and twos


@pytest.mark.parametrize(
    "pattern",
    [
        ".*mlp.*",
        "model[.]layers[.]0",
        "layers",
        "^model.*down_proj$",
        ".*gate|.*up",
        r"model\.\d",
        "",
    ],
)
def test_a_pattern_matches_what_it_matches_by_re(pattern):
    assert matches(pattern, NAME) is (re.match(pattern, NAME) is not None)


@pytest.mark.parametrize("pattern", ["(", "[a", "*", "(?P<a", "a{2,1}"])
def test_what_is_no_pattern_matches_nothing(pattern):
    assert not matches(pattern, NAME)


def test_a_pattern_that_takes_for_ever_is_named():
    with pytest.raises(UnsupportedModel, match=r"has a pattern of modules, .* more than 1 second"):
        matches(ENDLESS, NAME * 3)
