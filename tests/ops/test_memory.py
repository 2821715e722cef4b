import pytest
import torch

from pyllm import ops
from pyllm.ops import memory


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(memory, "LEAST", 1 << 16)
    monkeypatch.setattr(memory, "_spare", [])


def test_memory_comes_again_once_nobody_has_it():
    first = memory.empty((128, 256), torch.float32)
    at, view = first.data_ptr(), first[3:].T
    first.fill_(1)
    other = memory.empty((128, 256), torch.float32).fill_(2)
    assert other.data_ptr() != at
    del first
    third = memory.empty((128, 256), torch.float32).fill_(3)
    assert third.data_ptr() not in (at, other.data_ptr())
    assert (view == 1).all() and (other == 2).all()
    del view
    again = memory.empty((300, 90), torch.float32)  # less, and more than half
    assert again.data_ptr() == at and again.is_contiguous()
    del again
    assert memory.empty((2, 3, 8192), torch.bfloat16).shape == (2, 3, 8192)


def test_small_tensors_and_other_sizes_are_allocated():
    assert memory.empty((3, 5), torch.float16).shape == (3, 5)
    assert memory.empty((0, 5), torch.float32).shape == (0, 5)
    assert memory._spare == []
    large = memory.empty((1 << 20,), torch.float32)
    del large
    assert len(memory._spare[0]) == 1 << 22
    memory.empty((1 << 16,), torch.float32).fill_(1)  # too small for what is kept
    assert len(memory._spare[0]) == 1 << 18


def test_gradients_that_are_kept_stay_as_they_are():
    targets = torch.randint(500, (64,))
    logits = [torch.randn(64, 500, requires_grad=True) for _ in range(4)]
    found = [torch.autograd.grad(ops.cross_entropy(x, targets), x)[0] for x in logits]
    for x, d in zip(logits, found, strict=True):
        expected = torch.autograd.grad(torch.nn.functional.cross_entropy(x, targets), x)[0]
        torch.testing.assert_close(d, expected)
