import pytest
import torch
from twins import check_twin

from pyllm import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (1,), (3, 7), (1023,), (2, 5, 33), (3, 9001), (0, 4), (4, 0)]
TANH = {"approximate": "tanh"}
LINEAR = [("gelu", {}), ("gelu", TANH), ("silu", {})]  # x where x is large
FORMS = [*LINEAR, ("geglu", {}), ("geglu", TANH), ("swiglu", {}), ("sigmoid", {}), ("tanh", {}), ("relu_squared", {})]


def inputs_for(name, *tensors):
    return dict(zip(("gate", "up") if "glu" in name else ("x",), tensors, strict=False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "options"), FORMS)
def test_equals_its_twin(name, options, shape, dtype, isa):
    inputs = inputs_for(name, torch.randn(shape).mul(3).to(dtype), torch.randn(shape).to(dtype))
    slack = 32 if options else 8  # a tail that is the exponential of a rounded cubic
    check_twin(getattr(ops, name), getattr(reference, name), inputs, slack=slack, **options)


@pytest.mark.parametrize(("name", "options"), FORMS)
def test_layouts(name, options, isa):
    base = torch.randn(6, 4, 50)
    for gate, up in (
        base.chunk(2, -1),
        (base[:, 1], base[:, 2]),
        (base.transpose(0, 1), base.transpose(0, 1)),
        (base.transpose(1, 2), torch.randn(6, 50, 4)),
        (base[:, :, ::2], base[:, :, :25]),
    ):
        check_twin(getattr(ops, name), getattr(reference, name), inputs_for(name, gate, up), **options)


@pytest.mark.parametrize(("name", "options"), LINEAR)
def test_relative_error(name, options, isa):
    """Small results and far tails keep their digits."""
    x = torch.linspace(-9, 9, 20011)
    exact = getattr(reference, name)(x.double(), **options)
    if options:  # the twin's own tanh form cancels
        exact = x.double() * torch.sigmoid((8 / torch.pi) ** 0.5 * (x.double() + 0.044715 * x.double() ** 3))
    error = (getattr(ops, name)(x, **options).double() - exact).abs()
    assert (error <= (2e-5 if isa == "baseline" or options else 2e-6) * exact.abs() + 1e-38).all()


@pytest.mark.parametrize(("name", "options"), LINEAR)
def test_huge_and_nan_inputs(name, options, isa):
    x = torch.tensor([-1e38, -1e4, -200.0, -0.0, 0.0, 200.0, 1e4, 1e38, torch.inf, torch.nan], requires_grad=True)
    y = getattr(ops, name)(x, **options)
    y.sum().backward()
    assert torch.equal(y[:3], torch.zeros(3)) and torch.equal(y[5:9], x[5:9]) and y[9].isnan()
    expected = torch.tensor([0.0, 0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 1.0])
    torch.testing.assert_close(x.grad[:8], expected, rtol=0, atol=1e-6)


def test_saturation(isa):
    x = torch.tensor([-torch.inf, -1e38, -200.0, -0.0, 200.0, 1e38, torch.inf, torch.nan], requires_grad=True)
    for name, low, middle, high in (("sigmoid", 0.0, 0.5, 1.0), ("tanh", -1.0, 0.0, 1.0)):
        y = getattr(ops, name)(x)
        (slope,) = torch.autograd.grad(y.sum(), x)
        assert y[:7].tolist() == [low] * 3 + [middle] + [high] * 3 and y[7].isnan()
        assert slope[:3].eq(0).all() and slope[4:7].eq(0).all() and slope[7].isnan()
    y = ops.relu_squared(x)
    assert y[:4].eq(0).all() and torch.equal(y[4:7], x[4:7] ** 2) and y[7].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "options"), FORMS)
def test_same_bits_alone_in_a_batch_and_for_any_threads(name, options, dtype, isa, threads):
    op = getattr(ops, name)
    inputs = [torch.randn(70, 301).to(dtype).requires_grad_() for _ in range(2 if "glu" in name else 1)]
    results = []
    for n in (1, 2, 5):
        threads(n)
        y = op(*inputs, **options)
        results.append((y, *torch.autograd.grad(y.sin().sum(), inputs)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert torch.equal(op(*(t[17:18] for t in inputs), **options), results[0][0][17:18])
    assert torch.equal(op(*(t[:, 5:] for t in inputs), **options), results[0][0][:, 5:])


def test_errors_name_the_argument():
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"\[geglu\] up must have shape \(2, 8\), but got \(2, 7\)"):
        ops.geglu(x, x[:, 1:])
    with pytest.raises(TypeError, match=r"\[swiglu\] up must be float32, but got bfloat16"):
        ops.swiglu(x, x.bfloat16())
    with pytest.raises(TypeError, match=r"\[silu\] x must be float32, bfloat16 or float16, but got int64"):
        ops.silu(torch.ones(2, 8, dtype=torch.int64))
    for call in (lambda: ops.gelu(x, approximate="erf"), lambda: ops.geglu(x, x, approximate="erf")):
        with pytest.raises(ValueError, match="approximate must be 'none' or 'tanh', but got 'erf'"):
            call()
