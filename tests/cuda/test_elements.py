"""Activations, elementwise, rope, embedding and column sums."""

import pytest
import torch
from twins import check_twin

import pyllm
from pyllm import _C, ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLAIN, GATED = ["gelu", "silu", "sigmoid", "tanh", "relu_squared"], ["geglu", "swiglu"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PLAIN + GATED)
def test_activations(name, dtype, device):
    for shape in ((), (1,), (3, 7), (5, 64), (2, 3, 1023)):
        parts = [torch.randn(shape, device=device).mul(3).to(dtype) for _ in range(2)]
        inputs = {"x": parts[0]} if name in PLAIN else {"gate": parts[0], "up": parts[1]}
        check_twin(getattr(ops, name), getattr(reference, name), inputs)


def test_activations_where_rows_do_not_lie_together(device):
    halves = torch.randn(6, 5, 72, device=device)
    for gate, up in (halves.chunk(2, -1), halves.transpose(0, 1).chunk(2, -1), (halves[..., 1:9], halves[..., 8:16])):
        check_twin(ops.swiglu, reference.swiglu, {"gate": gate, "up": up})
        check_twin(ops.gelu, reference.gelu, {"x": gate}, approximate="tanh")


@pytest.mark.parametrize("name", PLAIN)
def test_activations_far_out(name, device):
    x = torch.tensor([-1e30, -100, -20, -14.4, -13, -5, -0.0, 0, 1e-20, 5, 13, 14.4, 20, 100, 1e18], device=device)
    ours, theirs = getattr(ops, name)(x), getattr(reference, name)(x.double())
    torch.testing.assert_close(ours.double(), theirs, rtol=3e-6, atol=1e-37)
    assert getattr(ops, name)(torch.full((3,), torch.nan, device=device)).isnan().all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64])
@pytest.mark.parametrize("kind", ["add", "subtract", "multiply", "divide", "minimum", "maximum"])
def test_elementwise(kind, dtype, device):
    if (kind == "divide") == (dtype == torch.int64) and (kind == "divide" or dtype != torch.int64):
        pytest.skip("not of that dtype")
    if kind in ("minimum", "maximum") and dtype != torch.int64:
        pytest.skip("not of that dtype")
    make = (lambda *s: torch.randint(-9, 9, s, device=device)) if dtype == torch.int64 else (
        lambda *s: torch.randn(s, device=device).to(dtype))  # fmt: skip
    a, b = make(3, 1, 7, 5), make(4, 7, 1)
    assert torch.equal(ops.elementwise(kind, a, b), reference.elementwise(kind, a, b))
    out = make(3, 4, 5, 7).transpose(2, 3)
    ops.elementwise(kind, a, b, out=out)
    assert torch.equal(out, reference.elementwise(kind, a, b))


def test_elementwise_copies_and_relu(device):
    x = torch.randn(5, 6, 7, device=device)
    for t in (x, x.bfloat16(), x.bool(), x.long(), x.int()):
        out = torch.empty(7, 6, 5, dtype=t.dtype, device=device).permute(2, 1, 0)
        assert torch.equal(ops.elementwise("copy", t, out=out), t)
    assert torch.equal(ops.elementwise("copy", x, out=x.half()), x.half())
    assert torch.equal(ops.elementwise("relu", x.half()), x.half().relu())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(interleaved, dtype, device):
    for (batch, length, heads, width), rotary in (((2, 3, 2, 8), 8), ((1, 5, 3, 10), 4), ((2, 1, 9, 64), 64)):
        x = torch.randn(batch, length, heads, width, device=device).to(dtype)
        for positions in (
            torch.arange(length, device=device) + 4000,
            torch.randint(0, 99, (batch, length), device=device),
        ):
            options = {"positions": positions, "rotary_dim": rotary, "interleaved": interleaved, "scale": 1.5}
            check_twin(ops.rope, reference.rope, {"x": x}, **options)
            check_twin(ops.rope, reference.rope, {"x": x.transpose(1, 2).contiguous().transpose(1, 2)}, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 5, 8, 65])
def test_embedding(width, dtype, device):
    weight = torch.randn(11, width, device=device).to(dtype)
    for ids in (torch.randint(0, 11, (4, 7)), torch.randint(0, 2, (300,)), torch.zeros(0, dtype=torch.int64)):
        for t in (ids.to(device), ids.int().to(device)):
            check_twin(ops.embedding, reference.embedding, {"weight": weight}, ids=t)
    check_twin(ops.embedding, reference.embedding, {"weight": torch.randn(9, 2 * width, device=device)[:, :width]},
               ids=torch.tensor([3, 8, 0], device=device))  # fmt: skip


@pytest.mark.parametrize("count, vocabulary", [(1, 1), (64, 2), (2049, 70000), (5000, 300)])
def test_the_gradient_of_many_ids(count, vocabulary, device):
    ids = torch.randint(0, vocabulary, (count,))
    ids[torch.rand(count) < 0.5] = vocabulary - 1  # a run over many borders
    dy = torch.randint(-8, 9, (count, 3)).float()  # whole numbers: any order has the same sum
    weight = torch.zeros(vocabulary, 3, device=device, requires_grad=True)
    ops.embedding(ids.to(device), weight).backward(dy.to(device))
    assert torch.equal(weight.grad.cpu(), torch.zeros(vocabulary, 3).index_add_(0, ids, dy))


def test_a_wrong_id_is_an_error_at_the_next_call(device, wait):
    weight = torch.randn(5, 8, device=device, requires_grad=True)
    for wrong, at in ((5, 2), (-1, 0), (1 << 40, 1)):
        ids = torch.zeros(3, dtype=torch.int64, device=device)
        ids[at] = wrong
        with torch.no_grad():
            out = ops.embedding(ids, weight)
        expected = rf"\[embedding\] ids must be in \[0, 5\), but got {wrong} at element {at}"
        with pytest.raises(IndexError, match=expected):
            pyllm.synchronize()
        good = torch.arange(3, device=device) != at
        assert out[~good].isnan().all() and torch.equal(out[good], weight[0].expand(2, 8))
        out = ops.embedding(ids, weight)
        wait()
        with pytest.raises(IndexError, match=expected):
            ops.gelu(weight)
        out.sum().backward()  # leaves the wrong row out, and says so again
        assert weight.grad[0].eq(2).all() and weight.grad[1:].eq(0).all()
        with pytest.raises(IndexError, match=expected):
            pyllm.synchronize()
        weight.grad = None
    pyllm.synchronize()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (33, 5), (4100, 3), (0, 4)])
def test_column_sums(shape, dtype, device):
    for a in (torch.randn(shape, device=device), torch.randn(shape[0], shape[1] + 3, device=device)[:, 1:-2]):
        a = a.to(dtype) if a.is_contiguous() else a
        sums = torch.empty(shape[1], dtype=a.dtype, device=device)
        _C.column_sum(a, sums)
        exact = a.double().sum(0)
        bound = 1e-5 * a.double().abs().sum(0) + torch.finfo(a.dtype).eps * exact.abs()
        assert ((sums.double() - exact).abs() <= bound).all()
