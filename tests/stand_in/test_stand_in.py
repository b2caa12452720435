"""The stand-in accelerator itself: what it refuses, counts and computes."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.helpers import stand_in
from tests.helpers.stand_in import accelerator
from tests.helpers.tiny import CONFIGS, randomise

pytestmark = pytest.mark.skipif(not stand_in.available(), reason="torch has no backend in Python")

MIXED = r"same device.*cpu and fake:0"


@pytest.fixture
def machine():
    with accelerator(devices=2) as machine:
        yield machine


@pytest.fixture
def on_device(machine):
    return torch.arange(12.0).reshape(3, 4).to("fake")


OPERATIONS = {
    "add": lambda a, b: a + b,
    "matmul": lambda a, b: a @ b.T,
    "cat": lambda a, b: torch.cat([a, b]),
    "stack": lambda a, b: torch.stack([a, b]),
    "in place": lambda a, b: a.clone().add_(b),
    "where": lambda a, b: torch.where(a > 1, a, b),
    "equal": lambda a, b: torch.equal(a, b),
    "linear": nn.functional.linear,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_host_and_device_do_not_meet(name, on_device):
    host = torch.ones(3, 4)
    for pair in ((on_device, host), (host, on_device)):
        with pytest.raises(RuntimeError, match=MIXED):
            OPERATIONS[name](*pair)
    OPERATIONS[name](on_device, host.to("fake"))


@pytest.mark.parametrize("name", OPERATIONS)
def test_two_devices_do_not_meet(name, on_device):
    with pytest.raises(RuntimeError, match=r"same device.*fake:0 and fake:1"):
        OPERATIONS[name](on_device, on_device.to("fake:1"))


def test_a_number_on_the_host_meets_the_device_where_an_operation_takes_numbers(on_device):
    number = torch.tensor(2.0)
    assert (on_device * number).device.type == "fake"
    assert torch.where(on_device > 1, on_device, number).device.type == "fake"
    with pytest.raises(RuntimeError, match=MIXED):
        torch.stack([on_device[0, 0], number])


def test_host_indices_read_the_device_but_device_indices_not_the_host(on_device):
    rows = torch.tensor([0, 2])
    assert on_device[rows].cpu().tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert on_device[[0, 2]].tolist() == on_device[rows.to("fake")].tolist()
    with pytest.raises(RuntimeError, match=MIXED):
        torch.ones(3, 4)[rows.to("fake")]
    with pytest.raises(RuntimeError, match=MIXED):
        on_device[rows] = torch.ones(2, 4)
    with pytest.raises(RuntimeError, match="same device"):
        on_device[rows.to("fake:1")]


def test_float64_is_refused_unless_allowed(on_device):
    attempts = [
        on_device.double,
        lambda: torch.ones(2, dtype=torch.float64).to("fake"),
        lambda: torch.zeros(2, dtype=torch.float64, device="fake"),
        lambda: torch.tensor([0.5], dtype=torch.float64, device="fake"),
        lambda: on_device.sum(dtype=torch.float64),
        lambda: on_device.to("cpu", torch.float64),
        lambda: torch.ones(3, 4, dtype=torch.float64).copy_(on_device),
    ]
    for attempt in attempts:
        with pytest.raises(TypeError, match="no float64"):
            attempt()
    assert on_device.cpu().double().dtype == torch.float64
    assert torch.ones(2, dtype=torch.float64).to("fake", torch.float32).dtype == torch.float32
    with accelerator(float64=True):
        assert torch.ones(2).to("fake").to("cpu", torch.float64).dtype == torch.float64
        assert torch.ones(2).to("fake").double().dtype == torch.float64


def test_numpy_is_refused(on_device):
    for attempt in (on_device.numpy, lambda: np.asarray(on_device)):
        with pytest.raises(TypeError, match="cpu"):
            attempt()
    assert on_device.cpu().numpy().shape == (3, 4)


def test_a_device_that_is_not_there_is_refused(machine):
    torch.ones(1).to("fake:1")
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.ones(1).to("fake:2")
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.ones(1, device="fake:2")


@pytest.mark.parametrize("name", ["qr", "svd", "eigh", "pinv"])
def test_what_not_every_device_has_is_refused(name, machine):
    with pytest.raises(NotImplementedError):
        getattr(torch.linalg, name)(torch.eye(3, device="fake"))


def test_a_generator_of_the_host_is_refused(machine):
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(2, device="fake", generator=torch.Generator())


def test_memory_is_counted_by_storage_and_freed():
    with accelerator(devices=2, limit=1000) as machine:
        first = torch.zeros(100, device="fake")
        views = [first[:50], first.reshape(10, 10).T]
        second = first.to("fake:1")
        assert machine.used == {0: 400, 1: 400}
        with pytest.raises(
            torch.OutOfMemoryError,
            match="Tried to allocate 604 bytes; fake:0 has 1000, of which 600",
        ):
            torch.zeros(151, device="fake")
        third = torch.zeros(150, device="fake")
        del first
        assert machine.used[0] == 1000
        del views, third
        assert (machine.used[0], machine.peak[0]) == (0, 1000)
        assert second.sum().item() == 0


def test_memory_that_autograd_keeps_is_counted():
    with accelerator() as machine:
        weight = torch.ones(100, device="fake", requires_grad=True)
        loss = (weight * weight).exp().sum()
        assert machine.used[0] > 800
        loss.backward()
        assert weight.grad.device.type == "fake"
        del loss
        assert machine.used[0] == 800  # the weight and its gradient


def test_gradients_on_any_device_and_without_memory():
    with accelerator(devices=2, limit=4000) as machine:
        weight = torch.ones(300, device="fake:1", requires_grad=True)
        loss = (weight * 2).sum()
        machine.limit = 2000
        with pytest.raises(torch.OutOfMemoryError):
            loss.backward()
        machine.limit = 4000
        (weight * 2).sum().backward()
        assert weight.grad.device == torch.device("fake:1")


def test_whole_numbers_are_counted(machine):
    counts = torch.histc(torch.tensor([0, 1, 1, 3], device="fake").int(), bins=4, min=0, max=3)
    assert (counts.dtype, counts.tolist()) == (torch.int32, [1, 2, 0, 1])


def test_torch_speaks_of_it():
    a = torch.accelerator
    with accelerator(devices=3, limit=5000) as machine:
        assert a.current_accelerator(check_available=True) == torch.device("fake")
        assert (a.is_available(), a.device_count(), a.current_device_index()) == (True, 3, 0)
        held = torch.zeros(100, device="fake:0")
        a.synchronize("fake:1")
        a.empty_cache()
        assert (machine.synchronised, machine.freed) == (1, 1)
        assert (a.memory_allocated(), a.max_memory_allocated("fake:1")) == (400, 0)
        assert a.get_memory_info(0) == (4600, 5000)
        with a.device_index(2):
            assert torch.zeros(1, device="fake").device == torch.device("fake:2")
        a.set_device_index(1)
        assert (a.current_device_index(), torch.get_device_module("fake").current_device()) == (
            1,
            1,
        )
        assert torch.get_device_module("fake").mem_get_info(held.device) == (4600, 5000)
    assert not a.is_available()
    assert a.current_accelerator(check_available=True) is None
    with pytest.raises(RuntimeError, match="no device fake"):
        torch.ones(2).to("fake")


def test_tied_parameters_stay_tied(machine):
    one, other = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    other.weight = one.weight
    both = nn.Sequential(one, other).to("fake")
    assert both[0].weight is both[1].weight
    assert machine.used == {0: 256}


def test_data_of_a_parameter_is_set_and_copied(machine):
    layer = nn.Linear(4, 4).to("fake")
    for dtype, device in ((torch.bfloat16, "fake:0"), (torch.float32, "fake:1")):
        layer.to(device, dtype)
        assert {(p.dtype, str(p.device), str(p.inner.dtype)) for p in layer.parameters()} == {
            (dtype, device, str(dtype))
        }
    again = deepcopy(layer)
    again.weight.data.zero_()
    assert layer.weight.abs().sum() > 0
    with torch.no_grad(), pytest.raises(NotImplementedError):
        layer.weight.t_()


@pytest.mark.parametrize(
    "name", ["silu", "mish", "gelu", "softmax", "logsigmoid", "rms_norm", "complex"]
)
def test_gradients_are_the_cpus_bit_for_bit(name):
    def gradient(values):
        values.requires_grad_()
        if name == "complex":
            turned = torch.view_as_complex(values) * torch.view_as_complex(values.sin()).conj()
            torch.view_as_real(turned).sin().sum().backward()
            return values.grad.cpu()
        settings = {"dim": -1} if name == "softmax" else {}
        arguments = [values.shape[-1:]] if name == "rms_norm" else []
        getattr(nn.functional, name)(values, *arguments, **settings).sin().sum().backward()
        return values.grad.cpu()

    values = torch.randn(16, 33, 2)
    expected = gradient(values.clone())
    with accelerator():
        assert torch.equal(gradient(values.to("fake")), expected)


def outputs(model, ids, kernel):
    """Logits, greedy answers, and the gradient of one loss."""
    with sdpa_kernel(kernel):
        with torch.inference_mode():
            logits = model(ids).logits
            answers = model.generate(ids, max_new_tokens=8, do_sample=False)
        weight = model.get_input_embeddings().weight.requires_grad_()
        model(ids).logits.logsumexp(-1).mean().backward()
    return logits.cpu(), answers.cpu(), weight.grad.cpu()


@pytest.mark.parametrize(
    ("attention", "kernel"),
    [("eager", SDPBackend.FLASH_ATTENTION), ("sdpa", SDPBackend.MATH)],
)
@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_the_cpus_bit_for_bit(attention, kernel, family, dtype):
    from transformers import AutoModelForCausalLM

    config = CONFIGS[family]()
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    randomise(model)
    model = model.to(dtype).requires_grad_(False)
    ids = torch.randint(4, 300, (3, 9))
    expected = outputs(deepcopy(model), ids, kernel)
    with accelerator():
        results = outputs(model.to("fake"), ids.to("fake"), kernel)
    assert all(
        torch.equal(result, wanted) for result, wanted in zip(results, expected, strict=True)
    )
