import pytest
import torch
from ops import test_wkv
from ops.test_wkv import DTYPES

import pyllm
from pyllm import ops


def inputs(*args, device):
    return {name: t.to(device) for name, t in test_wkv.inputs(*args).items()}


def state_of(batch, heads, dim, device):
    return torch.randn(batch, heads, dim, dim).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (2, 5, 3, 7), (1, 37, 2, 16), (3, 16, 2, 33), (2, 33, 1, 64), (1, 18, 1, 97), (1, 3, 1, 128)],
)
def test_equals_its_twin(shape, dtype, device):
    batch, _, heads, dim = shape
    test_wkv.check(inputs(*shape, dtype, device=device) | {"state": state_of(batch, heads, dim, device)})


@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths_and_layouts(dtype, device):
    lengths = torch.tensor([3, 19, 0, 16, 1], device=device)
    given = inputs(5, 19, 2, 12, dtype, device=device)
    test_wkv.check(given, lengths=lengths)
    test_wkv.check(given | {"state": state_of(5, 2, 12, device).transpose(2, 3)}, lengths=lengths)
    strided = {name: t.transpose(1, 2).contiguous().transpose(1, 2) for name, t in given.items()}  # heads first
    strided["k"] = torch.stack((given["k"], given["v"]), -1)[..., 0]
    strided["r"] = torch.cat((given["r"], given["v"]), 2)[:, :, :2]
    test_wkv.check(strided, lengths=lengths)


def test_more_heads_than_blocks_of_backward(device):
    test_wkv.check(inputs(90, 2, 3, 5, device=device) | {"state": state_of(90, 3, 5, device)})


def test_empty(device):
    for shape in ((0, 3, 2, 4), (2, 3, 0, 4), (2, 3, 2, 0)):
        test_wkv.check(inputs(*shape, device=device))
    state = state_of(2, 3, 4, device)
    y, last = ops.wkv(**inputs(2, 0, 3, 4, device=device), state=state)
    assert y.shape == (2, 0, 3, 4) and torch.equal(last, state)


@pytest.mark.parametrize("dim", [20, 64])
@torch.no_grad()
def test_same_bits_alone_in_any_batch_padding_and_pieces(dim, device):
    time, state = 41, state_of(5, 2, dim, device)
    given, lengths = inputs(5, time, 2, dim, device=device), torch.tensor([time, 0, 1, 16, 33])
    padded = ops.wkv(**given, state=state, lengths=lengths.to(device))
    for i, length in enumerate(lengths.tolist()):
        y, last = ops.wkv(**{name: t[i : i + 1, :length] for name, t in given.items()}, state=state[i : i + 1])
        assert torch.equal(y[0], padded[0][i, :length]) and torch.equal(last[0], padded[1][i])
        assert (padded[0][i, length:] == 0).all()
    one_head = ops.wkv(**{name: t[:1, :, 1:] for name, t in given.items()}, state=state[:1, 1:])
    assert torch.equal(one_head[0], padded[0][:1, :, 1:])
    whole, last = ops.wkv(**given)
    carried, pieces = None, []
    for piece in zip(*(t.split([15, 2, 24], 1) for t in given.values()), strict=True):
        y, carried = ops.wkv(*piece, carried)
        pieces.append(y)
    assert torch.equal(torch.cat(pieces, 1), whole) and torch.equal(carried, last)


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
    lengths, clean = torch.tensor([2, 18, 0], device=device), inputs(3, 18, 2, 8, device=device)
    dirty = {name: t.clone() for name, t in clean.items()}
    for t in dirty.values():
        t[0, 2:], t[2] = torch.nan, torch.inf
    results = []
    for given in (clean, dirty):
        leaves = [t.requires_grad_() for t in given.values()]
        y, last = ops.wkv(**given, lengths=lengths)
        results.append((y, last, *torch.autograd.grad(y.sum() + last.sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nan_is_not_hidden(device):
    given = inputs(2, 6, 2, 4, device=device)
    given["k"][1, 3, 0, 2] = torch.nan
    y, last = ops.wkv(**given)
    assert y[0].isfinite().all() and y[1, :, 1].isfinite().all() and y[1, :3, 0].isfinite().all()
    assert y[1, 3:, 0].isnan().all() and last[1, 0].isnan().any()


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
