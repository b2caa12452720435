import numpy as np
import pytest
import torch

from abliterator.errors import UnsupportedModel
from abliterator.formats import FORMATS, format_of, other_neighbour


@pytest.mark.parametrize("name", FORMATS)
def test_a_view_is_of_the_bytes_themselves(name):
    fmt = FORMATS[name]
    buffer = bytearray(6 * fmt.stored_dtype.itemsize)
    view = fmt.view(memoryview(buffer), (2, 3))
    view[1, 2] = 1.5
    assert torch.frombuffer(buffer, dtype=fmt.stored_dtype)[5] == 1.5


def test_an_unknown_format_names_the_tensor():
    with pytest.raises(UnsupportedModel, match=r"layers\.3.*F8_E5M2"):
        format_of("F8_E5M2", "layers.3")


def test_the_other_neighbour_against_numpy():
    """float16 has an oracle in numpy.nextafter; signs, subnormals and the largest included."""
    fmt = FORMATS["F16"]
    stored = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16)
    stored = stored[torch.isfinite(stored) & (stored != 0)]
    for side in (-1, 1):
        towards = np.float16(np.inf) * np.float16(side)
        with np.errstate(over="ignore"):  # beyond the largest lies infinity, and that is the point
            expected = torch.from_numpy(np.nextafter(stored.numpy(), towards))
        step = (expected.float() - stored.float()).nan_to_num(posinf=1.0, neginf=-1.0)
        exact = stored.float() + 0.25 * step
        found = other_neighbour(stored, exact, fmt)
        usable = torch.isfinite(expected)
        assert torch.equal(found[usable].float(), expected[usable].float())
        assert torch.equal(found[~usable], stored[~usable])


def test_zero_has_no_other_neighbour():
    zero = torch.zeros(3, dtype=torch.bfloat16)
    exact = torch.tensor([1e-41, -1e-41, 0.0])
    assert torch.equal(other_neighbour(zero, exact, FORMATS["BF16"]), zero)


def test_the_other_neighbour_in_fp8_against_the_sorted_numbers():
    fmt = FORMATS["F8_E4M3"]
    numbers = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).view(fmt.stored_dtype)
    numbers = numbers[torch.isfinite(numbers.float())]
    line = numbers.float().unique()  # one zero, sorted
    for side in (-1, 1):
        at = torch.searchsorted(line, numbers.float())
        beyond = (at + side < 0) | (at + side >= len(line))
        expected = line[(at + side).clamp(0, len(line) - 1)]
        exact = numbers.float() + 0.25 * (expected - numbers.float())
        found = other_neighbour(numbers, exact, fmt).float()
        free = ~beyond & (numbers.float() != 0)
        assert torch.equal(found[free], expected[free])
        assert torch.equal(found[~free], numbers.float()[~free])


def test_fp8_is_clamped_to_its_largest_number():
    fmt = FORMATS["F8_E4M3"]
    stored = fmt.clamped(torch.tensor([1e4, -1e4, 3.0])).to(fmt.stored_dtype).float()
    assert stored.tolist() == [448.0, -448.0, 3.0]
