"""A sample of `python -m tests.placement_table`: in pieces, models have the same figures."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import stand_in
from tests.placement_table import compare, difference

pytestmark = [
    pytest.mark.slow,  # all together
    pytest.mark.skipif(not stand_in.available(), reason="torch has no backend in Python"),
]


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss", "mamba2", "olmo2"])
def test_figures_in_pieces_are_those_of_the_whole_model(name):
    assert compare(name) == {"host and disk": "equal", "two devices": "equal"}


def test_a_code_that_mixes_devices_is_refused_by_name():
    results = compare("biogpt")
    assert results["host and disk"] == "equal"
    assert results["two devices"].startswith("refused: The model in FOLDER does not run")


def test_the_largest_difference_is_seen():
    one = torch.tensor([1.0, 2.0])
    assert difference(one, one.clone()) == 0
    assert difference(one, torch.tensor([1.0, 2.5])) == 0.5
    assert difference([(1, 2)], [(1, 3)]) == 1
