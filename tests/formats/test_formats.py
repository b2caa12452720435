import pytest
import torch

from abliterator.errors import CheckpointError, UnsupportedModel
from abliterator.formats import (
    FORMATS,
    Measured,
    format_of,
    measured,
    preferred,
    storage_of,
)
from abliterator.formats._measured import figures
from abliterator.formats._numbers import F8_E4M3


@pytest.mark.parametrize("name", FORMATS)
def test_a_view_is_of_the_bytes_themselves(name):
    fmt = FORMATS[name]
    buffer = bytearray(6 * fmt.stored_dtype.itemsize)
    view = fmt.view(memoryview(buffer), (2, 3))
    view[1, 2] = 1.5
    assert torch.frombuffer(buffer, dtype=fmt.stored_dtype)[5] == 1.5


def test_auto_keeps_what_keeps_the_edit():
    """By the constants that were measured: no format's leak or noise asks for more bytes."""
    assert len(figures()) == 9
    for kind, ways in figures().items():
        assert preferred(kind) == "keep"
        for k, (leak, noise) in ways["keep"].items():
            assert leak > ways["dequantize"][k][0]
            assert noise > ways["dequantize"][k][1]
    assert measured("MXFP4", "keep", 2) == (3, Measured(*figures()["MXFP4"]["keep"][3]))
    assert measured("MXFP4", "keep", 0)[0] == 1
    assert measured("MXFP4", "keep", 99)[0] == 16


def test_an_unknown_format_names_the_tensor():
    with pytest.raises(UnsupportedModel, match=r"layers\.3.*F8_E5M2"):
        format_of("F8_E5M2", "layers.3")


def test_rounding_in_fp8_against_the_sorted_numbers():
    fmt = F8_E4M3
    line = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).view(fmt.stored_dtype).float()
    line = line[torch.isfinite(line)].unique()
    numbers = torch.linspace(-460, 460, 4001)
    distance = (line[:, None] - numbers).abs().amin(0)
    found = fmt.rounded(numbers)
    assert torch.equal((found - numbers).abs(), distance)
    assert found.abs().max() == 448.0  # no further, and no NaN


def test_rounding_keeps_the_dtype_of_the_calculation():
    numbers = torch.tensor([1.00390625, 1.0], dtype=torch.float64)
    assert FORMATS["BF16"].rounded(numbers).tolist() == [1.0, 1.0]
    assert FORMATS["BF16"].rounded(numbers).dtype == torch.float64


@pytest.mark.parametrize("listed", [0, "lm_head", {"lm_head": True}])
@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers"])
def test_a_list_of_modules_that_is_none_stops_before_anything_is_planned(key, listed):
    settings = {"quant_method": "fp8", key: listed}
    with pytest.raises(CheckpointError, match=f"quantization_config.{key}: .*expected a list"):
        storage_of({"quantization_config": settings})
    assert storage_of({"quantization_config": {**settings, key: None}}).settings[key] is None
