import pytest
import torch
from twins import check_twin

from pyllm import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 5), (2, 3, 33), (5, 64), (4, 1000), (3, 1029), (2, 4096), (30, 129), (0, 8)]
)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_equals_its_twin(name, shape, dtype, device):
    inputs = {"x": torch.randn(shape, device=device).mul(3).add(1).to(dtype)}
    inputs["weight"] = torch.randn(shape[-1], device=device).to(dtype)
    if name == "layer_norm":
        inputs["bias"] = torch.randn(shape[-1], device=device).to(dtype)
    check_twin(getattr(ops, name), getattr(reference, name), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_residual(name, dtype, device):
    for cols in (45, 1100):
        x, r = (torch.randn(3, 2, cols, device=device).to(dtype) for _ in range(2))
        inputs = {"x": x, "residual": r, "weight": torch.randn(cols, device=device)}
        check_twin(getattr(ops, name), getattr(reference, name), inputs)


def test_rows_too_long_for_shared_memory(device):
    x = torch.randn(2, 13001, device=device)
    check_twin(ops.layer_norm, reference.layer_norm, {"x": x, "weight": torch.randn(13001, device=device)})
    check_twin(ops.rms_norm, reference.rms_norm, {"x": x.bfloat16(), "residual": torch.randn_like(x).bfloat16()})


def test_strided_rows_and_no_parameters(device):
    base = torch.randn(9, 4, 52, device=device)
    for x in (base[:, 1], base[:, :, 3:40], base[:, :, 4:40], base.transpose(0, 1), base.transpose(1, 2)):
        check_twin(ops.layer_norm, reference.layer_norm, {"x": x})
        check_twin(ops.rms_norm, reference.rms_norm, {"x": x, "weight": torch.randn(x.shape[-1], device=device)})


def test_a_large_mean_does_not_cancel(device):
    check_twin(ops.layer_norm, reference.layer_norm, {"x": torch.randn(3, 257, device=device) + 4096})


@pytest.mark.parametrize("cols", [96, 1030])
def test_same_bits_alone_and_in_a_batch(cols, device):
    x, weight = torch.randn(40, cols, device=device), torch.randn(cols, device=device)
    assert torch.equal(ops.layer_norm(x[17:18], weight), ops.layer_norm(x, weight)[17:18])


def test_more_rows_than_blocks_of_backward(device):
    x = torch.randn(600, 5, device=device)
    check_twin(ops.layer_norm, reference.layer_norm, {"x": x, "weight": torch.randn(5, device=device)})
