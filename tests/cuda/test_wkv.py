import pytest
import torch
from ops import test_wkv
from ops.test_wkv import DTYPES, inputs, state_of

import pyllm
from pyllm import ops


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (2, 5, 3, 7), (1, 37, 2, 16), (3, 16, 2, 33), (2, 33, 1, 64), (1, 18, 1, 97), (1, 3, 1, 128)],
)
def test_equals_its_twin(shape, dtype, device):
    batch, _, heads, dim = shape
    test_wkv.check(inputs(*shape, dtype, device) | {"state": state_of(batch, heads, dim, device)})


@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths_and_layouts(dtype, device):
    test_wkv.check_lengths_and_layouts(dtype, device)


def test_more_heads_than_blocks_of_backward(device):
    test_wkv.check(inputs(90, 2, 3, 5, device=device) | {"state": state_of(90, 3, 5, device)})


def test_empty(device):
    test_wkv.check_empty(device)


@pytest.mark.parametrize("dim", [20, 64])
@torch.no_grad()
def test_same_bits_alone_in_any_batch_padding_and_pieces(dim, device):
    time, state = 41, state_of(5, 2, dim, device)
    given, lengths = inputs(5, time, 2, dim, device=device), torch.tensor([time, 0, 1, 16, 33])
    padded = ops.wkv(**given, state=state, lengths=lengths.to(device))
    test_wkv.check_rows_alone(given, state, lengths, padded)
    one_head = ops.wkv(**{name: t[:1, :, 1:] for name, t in given.items()}, state=state[:1, 1:])
    assert torch.equal(one_head[0], padded[0][:1, :, 1:])
    test_wkv.check_pieces(given, [15, 2, 24])


def test_gradients_have_the_same_bits_in_any_batch(device):
    def gradients(rows):
        leaves = [t[rows].clone().requires_grad_() for t in (*given.values(), state)]
        y, last = ops.wkv(*leaves)
        return torch.autograd.grad(y.sin().sum() + last.cos().sum(), leaves)

    given, state = inputs(3, 35, 2, 24, device=device), state_of(3, 2, 24, device)
    for ours, theirs in zip(gradients(slice(1, 2)), gradients(slice(None)), strict=True):
        assert torch.equal(ours, theirs[1:2])


def test_a_gradient_of_the_last_state_alone(device):
    given = inputs(1, 20, 1, 8, device=device)
    leaves = [t.requires_grad_() for t in given.values()]
    assert (torch.autograd.grad(ops.wkv(**given)[1].sum(), leaves)[0] == 0).all()


def test_padding_may_hold_anything(device):
    test_wkv.check_padding_that_holds_anything(device)


def test_nan_is_not_hidden(device):
    test_wkv.check_nan(device)


def test_a_wrong_length_is_raised_later(device):
    given = inputs(2, 3, 1, 4, device=device)
    for wrong in (-1, 4):
        y, _ = ops.wkv(**given, lengths=torch.tensor([3, wrong], device=device))
        with pytest.raises(ValueError, match=rf"\[wkv\] lengths must be in \[0, 3\], but got {wrong} at element 1"):
            pyllm.synchronize()
    assert y.isfinite().all()


def test_heads_too_large_are_refused(device):
    with pytest.raises(NotImplementedError, match=r"\[wkv\] .* r must have heads of at most 128, but got 129"):
        ops.wkv(**inputs(1, 1, 1, 129, device=device))
