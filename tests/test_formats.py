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
    with pytest.raises(UnsupportedModel, match=r"layers\.3.*F8_E4M3"):
        format_of("F8_E4M3", "layers.3")


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
