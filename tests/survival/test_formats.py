from __future__ import annotations

import pytest

from abliterator.errors import RecipeError
from abliterator.survival import FORMATS, formats_named


def test_names_are_found_in_any_case_and_each_once():
    found = formats_named([" FP8", "q4_k_m", "fp8"])
    assert [entry.name for entry in found] == ["fp8", "Q4_K_M"]


def test_every_format_is_found_by_its_name():
    assert formats_named(entry.name for entry in FORMATS) == FORMATS


@pytest.mark.parametrize(
    ("names", "hint"),
    [(["fp9"], "did you mean fp8"), (["Q4_K"], "did you mean Q4_K_"), ([], "names no format")],
)
def test_what_is_no_format_is_an_error_with_the_nearest(names, hint):
    with pytest.raises(RecipeError, match=hint):
        formats_named(names)
