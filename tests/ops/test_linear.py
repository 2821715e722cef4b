import pytest
import torch
from twins import check_twin

from pyllm import _C, ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "n"),
    [
        ((1, 1), 1),
        ((3, 5), 7),
        ((2, 13, 40), 33),
        ((1, 300), 100),
        ((25, 513), 65),
        ((2, 70, 300), 100),
        ((0, 4), 3),
        ((2, 0), 3),
    ],
)
def test_equals_its_twin(shape, n, dtype, kernels):
    inputs = {"x": torch.randn(shape), "weight": torch.randn(n, shape[-1]), "bias": torch.randn(n)}
    check_twin(ops.linear, reference.linear, {k: v.to(dtype) for k, v in inputs.items()}, slack=32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype, kernels):
    base, weight = torch.randn(6, 4, 50).to(dtype), torch.randn(50, 90).to(dtype)
    for x, w in (
        (base[:, 1, :37], weight.T[:41, 3:40]),
        (base.transpose(0, 1), weight.T),
        (base[0].T, torch.randn(9, 4).to(dtype)),
        (base[:, :, ::2], weight[:25].T[:, :]),
    ):
        check_twin(ops.linear, reference.linear, {"x": x, "weight": w}, slack=32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_alone_in_a_batch_and_for_any_threads(dtype, kernels, threads):
    x, w, b = (torch.randn(s).to(dtype).requires_grad_() for s in ((150, 1300), (170, 1300), (170,)))
    results = []
    for n in (1, 2, 5):
        threads(n)
        y = ops.linear(x, w, b)
        results.append((y, *torch.autograd.grad(y.sin().sum(), (x, w, b))))
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))
    for rows in (slice(7, 8), slice(60, 62), slice(3, 20)):
        assert torch.equal(ops.linear(x[rows], w, b), results[0][0][rows])


def test_errors_name_the_argument():
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"share K, but got \(2, 8\) and \(3, 7\)"):
        ops.linear(x, torch.ones(3, 7))
    with pytest.raises(TypeError, match=r"weight must be float32, but got bfloat16"):
        ops.linear(x, torch.ones(3, 8).bfloat16())
    with pytest.raises(ValueError, match=r"bias must have shape \(3,\), but got \(4,\)"):
        ops.linear(x, torch.ones(3, 8), torch.ones(4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "k", "n"),
    [
        (1, 300, 70),
        (1, 301, 300),
        (2, 5, 3),
        (2, 259, 140),
        (3, 513, 33),
        (4, 258, 70),
        (5, 257, 100),
        (9, 300, 65),
        (12, 261, 200),
        (40, 600, 130),
        (0, 4, 3),
        (2, 0, 3),
    ],
)
def test_a_packed_weight_gives_the_same_bits(rows, k, n, dtype, kernels):
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((rows, k), (k, n), (n,)))
    packed = ops.pack_linear(weight.T)
    assert packed.panels.dtype == dtype and packed.shape == (n, k)
    assert torch.equal(packed.panels, ops.pack_linear(weight.T.contiguous()).panels)
    assert torch.equal(ops.linear(x, packed, bias), ops.linear(x, weight.T, bias))
    assert torch.equal(ops.linear(x, packed), ops.linear(x, weight.T.contiguous()))


def test_a_packed_weight_that_does_not_fit_is_refused():
    x, packed = torch.randn(2, 8), ops.pack_linear(torch.randn(5, 8))
    with pytest.raises(ValueError, match=r"share K, but got \(2, 7\) and \(5, 8\)"):
        ops.linear(x[:, :7], packed)
    with pytest.raises(TypeError, match=r"weight must be bfloat16, but got float32"):
        ops.linear(x.bfloat16(), packed)
    with pytest.raises(ValueError, match=r"no gradients"):
        ops.linear(x.requires_grad_(), packed)
    with pytest.raises(ValueError, match=r"weight must have 2 dimension"):
        ops.pack_linear(torch.randn(5))


def test_a_weight_packed_for_another_instruction_set_is_refused():
    isas, chosen = _C.info()["isas"], _C.info()["isa"]
    packed = ops.pack_linear(torch.randn(5, 8))
    try:
        for other in isas:
            _C.set_isa(other)
            if other != chosen:
                with pytest.raises(ValueError, match=rf"must be packed for {other}, in panels of \d+ columns"):
                    ops.linear(torch.randn(2, 8), packed)
    finally:
        _C.set_isa(chosen)


def test_the_gradient_of_a_gradient_is_refused():
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(2, 5)
    (dx,) = torch.autograd.grad(ops.linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
