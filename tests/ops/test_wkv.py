import pytest
import torch
from twins import check_twin

from pyllm import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(batch, time, heads, dim, dtype=torch.float32, device="cpu"):
    """As RWKV-7 makes them: decays from exp(-exp(-0.5)) to 1, a removal key of length 1, a rate of learning below 1."""
    r, w, k, v, a, rate = torch.randn(6, batch, time, heads, dim)
    a = -torch.nn.functional.normalize(a, dim=-1)
    given = {"r": r, "w": -0.6065 * w.sigmoid(), "k": k / max(dim, 1) ** 0.5, "v": v, "a": a, "b": -a * rate.sigmoid()}
    return {name: t.to(device, dtype) for name, t in given.items()}


def state_of(batch, heads, dim, device="cpu"):
    return torch.randn(batch, heads, dim, dim).to(device)


def rounded(op):
    """The last state in the outputs' dtype, for the twins' harness."""

    def call(*args, **kwargs):
        y, state = op(*args, **kwargs)
        return y, state.to(y.dtype)

    return call


def check(given, **options):
    check_twin(rounded(ops.wkv), rounded(reference.wkv), given, slack=32, **options)


def check_lengths_and_layouts(dtype, device="cpu"):
    lengths = torch.tensor([3, 19, 0, 16, 1], device=device)
    given = inputs(5, 19, 2, 12, dtype, device)
    check(given, lengths=lengths)
    check(given | {"state": state_of(5, 2, 12, device).transpose(2, 3)}, lengths=lengths)
    strided = {name: t.transpose(1, 2).contiguous().transpose(1, 2) for name, t in given.items()}  # heads first
    strided["k"] = torch.stack((given["k"], given["v"]), -1)[..., 0]
    strided["r"] = torch.cat((given["r"], given["v"]), 2)[:, :, :2]
    check(strided, lengths=lengths)


def check_empty(device="cpu"):
    for shape in ((0, 3, 2, 4), (2, 3, 0, 4), (2, 3, 2, 0)):
        check(inputs(*shape, device=device))
    state = state_of(2, 3, 4, device)
    y, last = ops.wkv(**inputs(2, 0, 3, 4, device=device), state=state)
    assert y.shape == (2, 0, 3, 4) and torch.equal(last, state)


def check_rows_alone(given, state, lengths, padded):
    """What each sequence gets alone, without its padding, is what all get together."""
    for i, length in enumerate(lengths.tolist()):
        y, last = ops.wkv(**{name: t[i : i + 1, :length] for name, t in given.items()}, state=state[i : i + 1])
        assert torch.equal(y[0], padded[0][i, :length]) and torch.equal(last[0], padded[1][i])
        assert (padded[0][i, length:] == 0).all()


def check_pieces(given, *sizes):
    whole, last = ops.wkv(**given)
    for some in sizes:
        carried, pieces = None, []
        for piece in zip(*(t.split(some, 1) for t in given.values()), strict=True):
            y, carried = ops.wkv(*piece, carried)
            pieces.append(y)
        assert torch.equal(torch.cat(pieces, 1), whole) and torch.equal(carried, last)


def check_padding_that_holds_anything(device="cpu"):
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


def check_nan(device="cpu"):
    given = inputs(2, 6, 2, 4, device=device)
    given["k"][1, 3, 0, 2] = torch.nan
    y, last = ops.wkv(**given)
    assert y[0].isfinite().all() and y[1, :, 1].isfinite().all() and y[1, :3, 0].isfinite().all()
    assert y[1, 3:, 0].isnan().all() and last[1, 0].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 5, 3, 7), (1, 37, 2, 16), (2, 33, 1, 64), (1, 3, 1, 131), (3, 16, 2, 21)]
)
def test_equals_its_twin(shape, dtype, isa):
    batch, _, heads, dim = shape
    check(inputs(*shape, dtype) | {"state": state_of(batch, heads, dim)})


@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths_and_layouts(dtype, isa):
    check_lengths_and_layouts(dtype)


def test_empty():
    check_empty()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [20, 64])
def test_same_bits_alone_in_any_batch_padding_pieces_and_threads(dim, dtype, isa, threads):
    batch, time = 7, 41
    given, state = inputs(batch, time, 2, dim, dtype), state_of(batch, 2, dim)
    lengths = torch.tensor([time, 0, 1, 16, 17, 40, 33])
    results = []
    for n in (1, 2, 5):
        threads(n)
        results.append(ops.wkv(**given, state=state, lengths=lengths))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    check_rows_alone(given, state, lengths, results[0])
    one_head = ops.wkv(**{name: t[:, :, 1:] for name, t in given.items()}, state=state[:, 1:], lengths=lengths)
    assert torch.equal(one_head[0], results[0][0][:, :, 1:])
    check_pieces(given, [1] * time, [15, 2, 24])


def test_gradients_have_the_same_bits_for_any_threads_and_with_a_gradient(isa, threads):
    given, state = inputs(2, 35, 3, 24), torch.randn(2, 3, 24, 24, requires_grad=True)
    plain = ops.wkv(**given, state=state.detach())
    leaves = [*(t.requires_grad_() for t in given.values()), state]
    results = []
    for n in (1, 2, 5):
        threads(n)
        y, last = ops.wkv(**given, state=state)
        assert torch.equal(y, plain[0]) and torch.equal(last, plain[1])
        results.append(torch.autograd.grad(y.sin().sum() + last.cos().sum(), leaves))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_gradient_of_the_last_state_alone():
    given = {name: t.requires_grad_() for name, t in inputs(1, 20, 1, 8).items()}
    ours, theirs = (torch.autograd.grad(f(**given)[1].sin().sum(), list(given.values()), allow_unused=True)
                    for f in (ops.wkv, reference.wkv))  # fmt: skip
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert (ours[0] == 0).all()


def test_padding_may_hold_anything():
    check_padding_that_holds_anything()


def test_the_twin_is_the_published_equation():
    """S_t = S_(t-1) (diag(exp w) + a b') + v k', y = S r, in float64, with S as values by keys."""
    given = {name: t.double()[0, :, 0] for name, t in inputs(1, 9, 1, 5).items()}
    s, outputs = torch.randn(5, 5, dtype=torch.float64), []
    start = s.T[None, None]
    for r, w, k, v, a, b in zip(*given.values(), strict=True):
        s = s @ (torch.diag(w.exp()) + torch.outer(a, b)) + torch.outer(v, k)
        outputs.append(s @ r)
    y, last = reference.wkv(**{name: t[None, :, None] for name, t in given.items()}, state=start)
    torch.testing.assert_close(y[0, :, 0], torch.stack(outputs))
    torch.testing.assert_close(last[0, 0], s.T)


def test_nan_is_not_hidden():
    check_nan()


def test_errors_name_the_argument():
    given = inputs(2, 3, 2, 4)
    for name in "wkvab":
        with pytest.raises(ValueError, match=rf"\[wkv\] {name} must have shape \(2, 3, 2, 4\), but got \(2, 3, 2, 3\)"):
            ops.wkv(**given | {name: given[name][..., 1:]})
    with pytest.raises(ValueError, match=r"\[wkv\] r must have 4 dimensions \(B, T, H, D\), but got \(2, 3, 4\)"):
        ops.wkv(**given | {"r": given["r"][:, :, 0]})
    with pytest.raises(TypeError, match=r"\[wkv\] v must be float32, but got bfloat16"):
        ops.wkv(**given | {"v": given["v"].bfloat16()})
    with pytest.raises(TypeError, match=r"\[wkv\] r must be float32, bfloat16 or float16, but got int64"):
        ops.wkv(**given | {"r": given["r"].long()})
    with pytest.raises(ValueError, match=r"\[wkv\] state must have shape \(2, 2, 4, 4\), but got \(2, 2, 4, 3\)"):
        ops.wkv(**given, state=torch.zeros(2, 2, 4, 3))
    with pytest.raises(TypeError, match=r"\[wkv\] state must be float32, but got bfloat16"):
        ops.wkv(**given, state=torch.zeros(2, 2, 4, 4).bfloat16())
    with pytest.raises(ValueError, match=r"\[wkv\] lengths must be 0 to 3, but got 4 for sequence 1"):
        ops.wkv(**given, lengths=torch.tensor([3, 4]))
    with pytest.raises(ValueError, match=r"\[wkv\] lengths must have shape \(2,\), but got \(3,\)"):
        ops.wkv(**given, lengths=torch.tensor([3, 1, 1]))
    with pytest.raises(TypeError, match=r"\[wkv\] lengths must be int64, but got int32"):
        ops.wkv(**given, lengths=torch.tensor([3, 1]).int())
