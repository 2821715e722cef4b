import pytest
import torch
from twins import check_twin

from pyllm import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 5), (2, 7, 33), (1, 16), (5, 64), (4, 1000), (70, 129), (2048, 17), (0, 8)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_equals_its_twin(name, shape, dtype, isa):
    x = torch.randn(shape).mul(3).add(1).to(dtype)
    inputs = {"x": x, "weight": torch.randn(shape[-1]).to(dtype)}
    if name == "layer_norm":
        inputs["bias"] = torch.randn(shape[-1]).to(dtype)
    check_twin(getattr(ops, name), getattr(reference, name), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_residual(name, dtype, isa):
    x, r = torch.randn(6, 3, 45).to(dtype), torch.randn(6, 3, 45).to(dtype)
    inputs = {"x": x, "residual": r, "weight": torch.randn(45).to(dtype)}
    check_twin(getattr(ops, name), getattr(reference, name), inputs)


def test_without_parameters(isa):
    check_twin(ops.layer_norm, reference.layer_norm, {"x": torch.randn(4, 19)})
    check_twin(ops.rms_norm, reference.rms_norm, {"x": torch.randn(4, 19)})


def test_strided_rows(isa):
    base = torch.randn(9, 4, 50)
    for x in (base[:, 1], base[:, :, 3:40], base.transpose(0, 1), base.transpose(1, 2)):
        check_twin(ops.layer_norm, reference.layer_norm, {"x": x, "weight": torch.randn(x.shape[-1])})


def test_large_mean_does_not_cancel(isa):
    check_twin(ops.layer_norm, reference.layer_norm, {"x": torch.randn(3, 257) + 4096})


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_same_bits_alone_in_a_batch_and_for_any_threads(name, threads):
    op = getattr(ops, name)
    x, weight = torch.randn(300, 96, requires_grad=True), torch.randn(96, requires_grad=True)
    results = []
    for n in (1, 2, 5):
        threads(n)
        y = op(x, weight)
        results.append((y, *torch.autograd.grad(y.sin().sum(), (x, weight))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert torch.equal(op(x[17:18], weight), results[0][0][17:18])


def test_errors_name_the_argument():
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"\[layer_norm\] weight must have shape \(8,\), but got \(7,\)"):
        ops.layer_norm(x, torch.ones(7))
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16, but got int64"):
        ops.layer_norm(torch.ones(2, 8, dtype=torch.int64))
    with pytest.raises(TypeError, match="residual must be float32, but got bfloat16"):
        ops.rms_norm(x, residual=x.bfloat16())
    with pytest.raises(ValueError, match="residual must have shape"):
        ops.rms_norm(x, residual=x[:1])
    with pytest.raises(ValueError, match="at least 1 dimension"):
        ops.rms_norm(torch.tensor(1.0))
