"""What is computed in float64 is computed on the host: not every device has it."""

import pytest
import torch

from abliterator.anatomy import anatomy_of
from abliterator.bake import plan_edits, preview_edit
from abliterator.checkpoint import Checkpoint
from abliterator.model import load_model
from abliterator.recipe import Edit
from abliterator.subspace import Moments, orthonormal_basis, random_basis, removal_of_basis
from tests.helpers import stand_in
from tests.helpers.stand_in import accelerator

pytestmark = pytest.mark.skipif(not stand_in.available(), reason="torch has no backend in Python")


def test_moments_and_bases_of_what_lies_on_a_device():
    vectors = torch.randn(5, 2, 8)
    expected = Moments(2, 8)
    expected.update(vectors)
    with accelerator():
        moments = Moments(2, 8)
        moments.update(vectors.to("fake"))
        basis = orthonormal_basis(vectors[:3, 0].to("fake"))
    assert torch.equal(moments.freeze().m2, expected.freeze().m2)
    assert torch.equal(basis, orthonormal_basis(vectors[:3, 0]))


def test_gradients_of_a_removal_are_converted_on_the_host():
    basis, hidden = random_basis(8, 2, seed=0), torch.randn(4, 8)

    def gradient(basis, hidden):
        basis.requires_grad_()
        removal = removal_of_basis(basis).to(torch.float32, str(hidden.device))
        removal.removed(hidden).sin().sum().backward()
        return basis.grad

    expected = gradient(basis.clone(), hidden)
    with accelerator():
        assert torch.equal(gradient(basis.clone(), hidden.to("fake")), expected)


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("where", ["cpu", "fake"])
def test_gradients_flow_to_a_basis_wherever_it_lies(family, where, tiny_folder):
    folder = tiny_folder(family)
    checkpoint = Checkpoint.open(folder)
    plan = plan_edits(checkpoint, anatomy_of(checkpoint.config), Edit())

    def gradient(device, basis):
        loaded = load_model(folder, device=device, dtype="float32")
        loaded.model.set_attn_implementation("eager")
        basis.requires_grad_()
        with preview_edit(loaded, plan, basis):
            logits = loaded.model(torch.tensor([[4, 9, 17]], device=device)).logits
        logits[0, -1].log_softmax(0)[5].backward()
        return basis.grad.cpu()

    basis = random_basis(32, 2, seed=0).float()
    expected = gradient("cpu", basis.clone())
    with accelerator():
        assert torch.equal(gradient("fake", basis.to(where, copy=True)), expected)
