import dataclasses

import pytest
import torch
from ops.test_quantized_linear import random_weight
from twins import check_twin

import pyllm
from pyllm import _C, ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = [(8, False, 32), (8, True, 32), (4, False, 32), (4, True, 32), (8, False, 16), (8, True, 16)]


def packed_on(device, weight):
    """The weight as its kernels read it on the device, also where that is emulated."""
    packed = ops.pack_quantized(weight)
    if device.type == "cuda":
        return packed, packed.to(device)
    panels = packed._panels_of(_C.quantized_panel_width(True))
    return packed, ops.PackedQuantizedWeight(panels, *packed.layout, packed.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "minimums", "group"), FORMATS)
def test_the_bits_of_the_cpu(bits, minimums, group, dtype, device, on_cpu):
    fused = _C.info()["isa"] != "baseline"  # whose sums round their products, too
    for scales, shapes in (
        (torch.float16, [(1, 5), (2, 33), (70, 100)]),
        (torch.float32, [(3, 1100), (8, 20), (9, 20)]),
    ):
        for rows, k in shapes:
            n = 75 if rows > 8 else 19
            packed, moved = packed_on(device, random_weight(n, k, bits, minimums, scales, group))
            x, bias, dy = torch.randn(rows, k).to(dtype), torch.randn(n).to(dtype), torch.randn(rows, n).to(dtype)
            results = []
            for call, weight, where in ((on_cpu, packed, torch.device("cpu")), (lambda f: f(), moved, device)):

                def run(weight=weight, where=where, x=x, bias=bias, dy=dy):
                    leaf = x.to(where).requires_grad_()
                    y = ops.quantized_linear(leaf, weight, bias.to(where))
                    (dx,) = torch.autograd.grad(y, leaf, dy.to(where))
                    return y.detach().cpu(), dx.cpu(), ops.quantized_linear(x.to(where), weight).cpu()

                results.append(call(run))
            for ours, theirs in zip(results[1], results[0], strict=True):
                close = 0 if fused else 4 * torch.finfo(dtype).eps * theirs.abs().max().item()
                torch.testing.assert_close(ours, theirs, rtol=0, atol=close)
    pyllm.synchronize()


@pytest.mark.parametrize(("bits", "minimums", "group"), [(8, False, 128), (4, False, 256), (4, True, 64)])
def test_larger_groups_are_taken_piece_by_piece(bits, minimums, group, device):
    weight = random_weight(45, 300, bits, minimums, group=group)
    pieces = dataclasses.replace(weight, group=32)
    for rows in (3, 70):
        x = torch.randn(rows, 300, device=device)
        found, expected = (ops.quantized_linear(x, packed_on(device, w)[1]) for w in (weight, pieces))
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("bits", "minimums", "group"), FORMATS)
def test_equals_its_twin(bits, minimums, group, device):
    for rows, n, k in ((5, 33, 90), (20, 70, 65)):
        weight = random_weight(n, k, bits, minimums, group=group)
        _, moved = packed_on(device, weight)
        check_twin(
            lambda x, bias, moved=moved: ops.quantized_linear(x, moved, bias),
            lambda x, bias, weight=weight: reference.quantized_linear(x.cpu(), weight, bias.cpu()).to(device),
            {"x": torch.randn(rows, k, device=device), "bias": torch.randn(n, device=device)},
            slack=32,
        )


@pytest.mark.parametrize(("bits", "minimums", "group"), FORMATS)
def test_same_bits_alone_and_in_a_batch(bits, minimums, group, device):
    _, weight = packed_on(device, random_weight(40, 300, bits, minimums, group=group))
    x, dy = torch.randn(70, 300, device=device), torch.randn(70, 40, device=device)
    y = ops.quantized_linear(x, weight)
    for rows in (slice(7, 8), slice(64, 66), slice(3, 7), slice(60, 68), slice(0, 20)):
        assert torch.equal(ops.quantized_linear(x[rows], weight), y[rows])
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(ops.quantized_linear(leaf, weight), leaf, dy)
    part = x[5:8].clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(ops.quantized_linear(part, weight), part, dy[5:8])[0], dx[5:8])


def test_strided_and_empty_inputs(device):
    _, weight = packed_on(device, random_weight(20, 40, 4, True))
    base = torch.randn(6, 4, 80, device=device)
    for x in (base[:, 1, 3:43], base[:, :, 40:], base[0, :, :40].T.contiguous().T):
        assert torch.equal(ops.quantized_linear(x, weight), ops.quantized_linear(x.contiguous(), weight))
    assert ops.quantized_linear(base[:0, 0, :40], weight).shape == (0, 20)
    _, nothing = packed_on(device, random_weight(0, 40, 8, False))
    assert ops.quantized_linear(base[:, 0, :40], nothing).shape == (6, 0)
    _, narrow = packed_on(device, random_weight(5, 0, 8, False))
    for rows in (2, 30):
        bias = torch.randn(5, device=device)
        assert torch.equal(
            ops.quantized_linear(torch.empty(rows, 0, device=device), narrow, bias), bias.expand(rows, -1)
        )


def test_a_row_that_is_not_finite_gives_nan_and_disturbs_no_other(device):
    _, weight = packed_on(device, random_weight(40, 64, 8, True))
    for rows in (6, 20):
        x = torch.randn(rows, 64, device=device)
        expected = ops.quantized_linear(x, weight)
        x[2, 40], x[4, 0], x[5] = torch.inf, torch.nan, 0.0
        y = ops.quantized_linear(x, weight)
        assert y[[2, 4]].isnan().all() and torch.equal(y[[0, 1, 3]], expected[[0, 1, 3]]) and (y[5] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "minimums", "group"), FORMATS)
def test_embedding(bits, minimums, group, dtype, device):
    weight = random_weight(70, 75, bits, minimums, torch.float32, group)
    _, moved = packed_on(device, weight)
    for ids in (
        torch.randint(0, 70, (4, 7)),
        torch.tensor(69),
        torch.randint(0, 70, (0, 3)),
        torch.randint(70, (9, 6)).T,
    ):
        for own in (ids, ids.int()):
            found = ops.quantized_embedding(own.to(device), moved, dtype)
            assert torch.equal(found.cpu(), reference.quantized_embedding(ids, weight, dtype))


def test_a_wrong_id_is_an_error_at_the_next_call(device):
    _, moved = packed_on(device, random_weight(70, 40, 8, False))
    found = ops.quantized_embedding(torch.tensor([3, 70, -1], device=device), moved)
    with pytest.raises(
        IndexError, match=r"\[quantized_embedding\] ids must be in \[0, 70\), but got (70|-1) at element"
    ):
        pyllm.synchronize()
    assert found.isnan().all(1).tolist() == [False, True, True]


def test_a_weight_that_is_not_packed_for_the_device_is_refused(device):
    _, packed = packed_on(device, random_weight(40, 64, 8, False))
    other = ops.PackedQuantizedWeight(packed._panels_of(16).to(device), *packed.layout, packed.shape)
    with pytest.raises(ValueError, match=r"must be packed for CUDA, in panels of 8 columns, but got .*: pack it again"):
        ops.quantized_linear(torch.randn(2, 64, device=device), other)
    shifted = torch.empty(packed.panels.numel() + 8, dtype=torch.uint8, device=device)[8:].view(packed.panels.shape)
    with pytest.raises(ValueError, match="weight must begin at a multiple of 16 bytes"):
        ops.quantized_linear(torch.randn(2, 64, device=device),
                             ops.PackedQuantizedWeight(shifted, *packed.layout, packed.shape))  # fmt: skip
