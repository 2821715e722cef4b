import sys

import pytest
import torch
from twins import check_twin

import pyllm
from pyllm import ops, reference
from pyllm.ops.cross_entropy import _linear_on_cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rows(device, *shape, ignored=()):
    targets = torch.randint(0, shape[-1], shape[:-1], device=device)
    for i in ignored:
        targets.view(-1)[i] = -100
    return torch.randn(shape, device=device).mul(4), targets


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_its_twin(reduction, dtype, device):
    for shape in ((1, 1), (2, 3, 7), (5, 1024), (3, 1031), (2, 20011)):
        logits, targets = rows(device, *shape, ignored=[1] if shape[0] > 1 else [])
        for smoothing in (0.0, 0.1):
            check_twin(ops.cross_entropy, reference.cross_entropy, {"logits": logits.to(dtype)}, targets=targets,
                       reduction=reduction, label_smoothing=smoothing)  # fmt: skip


def test_strided_rows_and_targets_of_32_bits(device):
    base, targets = rows(device, 4, 3, 40)
    for logits in (base[..., :37], base[..., 1:38], base[:, :, 8:24].transpose(0, 1)):
        t = targets.remainder(logits.shape[-1])
        t = t if logits.shape[:2] == t.shape else t.T
        check_twin(ops.cross_entropy, reference.cross_entropy, {"logits": logits}, targets=t.int())


def test_masked_and_extreme_logits(device):
    logits, targets = rows(device, 3, 600)
    logits[0, :300], logits[1, 1:], logits[2] = -torch.inf, -torch.inf, logits[2] * 1e4
    targets[:] = torch.tensor([400, 0, 7], device=device)
    results = []
    for f, x in ((ops.cross_entropy, logits.clone()), (torch.nn.functional.cross_entropy, logits.double())):
        losses = f(x.requires_grad_(), targets, reduction="none")
        losses.sum().backward()
        results.append((losses.detach().double(), x.grad.double()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    logits[0, 5] = torch.nan
    assert ops.cross_entropy(logits, targets, reduction="none").isnan().tolist() == [True, False, False]


def test_all_rows_ignored(device):
    logits, _ = rows(device, 3, 9)
    targets = torch.full((3,), -100, device=device)
    assert ops.cross_entropy(logits, targets).isnan()
    assert ops.cross_entropy(logits, targets, reduction="sum") == 0
    assert ops.cross_entropy(logits[:0], targets[:0]).isnan()
    assert ops.cross_entropy(logits[:0], targets[:0], reduction="sum") == 0


def test_a_wrong_target_is_an_error_at_the_next_call(device, wait):
    logits, targets = rows(device, 4, 6)
    targets[2] = 6
    logits.requires_grad_()
    losses = ops.cross_entropy(logits, targets, reduction="none")
    wait()
    expected = r"\[cross_entropy\] targets must be in \[0, 6\), but got 6 at element 2"
    with pytest.raises(IndexError, match=expected):
        losses.sum().backward()
    assert losses.isnan().tolist() == [False, False, True, False]
    losses.sum().backward()
    assert logits.grad.isnan().all(1).tolist() == [False, False, True, False]


def test_same_bits_alone_and_in_a_batch(device):
    logits, targets = rows(device, 9, 3001)
    alone = [ops.cross_entropy(logits[i : i + 1], targets[i : i + 1], reduction="none") for i in range(9)]
    assert torch.equal(torch.cat(alone), ops.cross_entropy(logits, targets, reduction="none"))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_of_a_linear_layer_by_blocks(reduction, device, monkeypatch):
    monkeypatch.setattr(sys.modules["pyllm.ops.cross_entropy"], "_BLOCK", 1)  # so blocks are of 128 rows
    x, weight, bias = (torch.randn(s, device=device) for s in ((300, 6), (11, 6), (11,)))
    targets = torch.randint(0, 11, (300,), device=device)
    targets[5] = -100
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    expected = reference.linear_cross_entropy(leaves[0], leaves[1], targets, leaves[2], reduction=reduction)
    dloss = torch.randn(300, device=device) if reduction == "none" else torch.tensor(1.0, device=device)
    expected.backward(dloss)
    options = (-100, 0.0, reduction)
    loss, gradients = _linear_on_cuda(x, weight, targets, bias, options, dloss, (True, True, True))
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    for ours, leaf in zip(gradients, leaves, strict=True):
        torch.testing.assert_close(ours, leaf.grad, rtol=1e-4, atol=1e-6)
    plain, nothing = _linear_on_cuda(x, weight, targets, bias, options)
    assert torch.equal(plain, loss) and nothing == [None] * 3
    if device.type == "cuda":
        ours = [t.clone().requires_grad_() for t in (x, weight, bias)]
        ops.linear_cross_entropy(ours[0], ours[1], targets, ours[2], reduction=reduction).backward(dloss)
        for a, b in zip(ours, leaves, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    pyllm.synchronize()
