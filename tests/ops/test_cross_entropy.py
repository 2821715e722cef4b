import sys

import pytest
import torch
from twins import check_twin

from pyllm import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def targets_for(shape, classes, dtype=torch.int64):
    targets = torch.randint(classes, shape, dtype=dtype)
    targets[torch.rand(shape) < 0.2] = -100
    return targets


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 7), (2, 5, 33), (1023, 17), (4, 5000), (2, 8195), (0, 6)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_its_twin(shape, reduction, dtype, isa):
    targets = targets_for(shape[:-1], shape[-1])
    if targets.numel():
        targets.view(-1)[0] = 0
    elif reduction == "mean":
        assert ops.cross_entropy(torch.randn(shape), targets).isnan()
        return
    inputs = {"logits": torch.randn(shape).mul(4).to(dtype), "targets": targets}
    for smoothing in (0.0, 0.1):
        check_twin(ops.cross_entropy, reference.cross_entropy, inputs, label_smoothing=smoothing, reduction=reduction)


def test_layouts(isa):
    base = torch.randn(6, 5, 40)
    for logits in (base[:, :-1], base[::2, :, 3:30], base.transpose(0, 1), base.transpose(1, 2), base[:, 1]):
        targets = targets_for(logits.T.shape[1:] if logits.dim() == 2 else logits.shape[:-1][::-1], logits.shape[-1])
        targets = (targets if logits.dim() == 2 else targets.T).int()
        check_twin(ops.cross_entropy, reference.cross_entropy, {"logits": logits, "targets": targets})


def test_logits_of_any_size(isa):
    logits = torch.tensor([[3e4, -3e4, 1.0], [-1e4, -1e4, -1e4], [80.0, 90.0, 100.0], [0.0, 0.0, -1e30]])
    check_twin(ops.cross_entropy, reference.cross_entropy, {"logits": logits, "targets": torch.tensor([1, 2, 0, 1])})
    inputs = {"logits": torch.randn(3, 9000) + 5000, "targets": torch.tensor([1, 2, 0])}
    check_twin(ops.cross_entropy, reference.cross_entropy, inputs, label_smoothing=0.2)


def test_infinite_and_nan_logits(isa):
    logits = torch.randn(4, 5000)
    logits[0, 10:4990] = -torch.inf  # masked classes, with whole chunks of them
    logits[1, :] = -torch.inf
    logits[2, 4500] = torch.nan
    logits[3, 7] = torch.inf
    losses = ops.cross_entropy(logits.requires_grad_(), torch.tensor([3, 3, 3, 3]), reduction="none")
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([3, 3, 3, 3]), reduction="none")
    torch.testing.assert_close(losses, expected, equal_nan=True)
    ours, their = (torch.autograd.grad(x.sum(), logits)[0] for x in (losses, expected))
    torch.testing.assert_close(ours, their, equal_nan=True)


def test_nothing_but_ignored_rows():
    logits, targets = torch.randn(3, 4, requires_grad=True), torch.full((3,), -100)
    assert ops.cross_entropy(logits, targets).isnan()
    assert ops.cross_entropy(logits, targets, reduction="sum") == 0
    assert (torch.autograd.grad(ops.cross_entropy(logits, targets, reduction="sum"), logits)[0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [100, 9001])
def test_same_bits_alone_in_a_batch_and_for_any_threads(classes, dtype, isa, threads):
    logits = torch.randn(70, classes).to(dtype).requires_grad_()
    targets = targets_for((70,), classes)
    results = []
    for n in (1, 2, 5):
        threads(n)
        losses = ops.cross_entropy(logits, targets, reduction="none")
        mean = ops.cross_entropy(logits, targets)
        results.append((losses, mean, *torch.autograd.grad(losses.sin().sum() + mean, logits)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    for row in (0, 33, 69):
        alone = ops.cross_entropy(logits[row : row + 1], targets[row : row + 1], reduction="none")
        assert torch.equal(alone, results[0][0][row : row + 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "classes"), [((1, 1), 1), ((7, 5), 13), ((2, 3, 40), 100), ((290, 33), 65), ((0, 4), 3)]
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_equals_its_twin(shape, classes, reduction, dtype, kernels, monkeypatch):
    monkeypatch.setattr(sys.modules["pyllm.ops.cross_entropy"], "_BLOCK", 1)  # blocks of 120 rows
    targets = targets_for(shape[:-1], classes)
    if targets.numel():
        targets.view(-1)[0] = 0
    elif reduction == "mean":
        assert ops.linear_cross_entropy(torch.randn(shape), torch.randn(classes, shape[-1]), targets).isnan()
        return
    inputs = {"x": torch.randn(shape), "weight": torch.randn(classes, shape[-1]), "bias": torch.randn(classes)}
    inputs = {k: v.to(dtype) for k, v in inputs.items()} | {"targets": targets}
    for smoothing in (0.0, 0.1):
        check_twin(ops.linear_cross_entropy, reference.linear_cross_entropy, inputs, slack=32,
                   label_smoothing=smoothing, reduction=reduction)  # fmt: skip
    del inputs["bias"]
    check_twin(ops.linear_cross_entropy, reference.linear_cross_entropy, inputs, slack=32, reduction=reduction)


def test_linear_layouts(kernels):
    base, weight = torch.randn(6, 5, 40), torch.randn(40, 90)
    for x, w in ((base[:, :-1], weight.T), (base[0].T, torch.randn(9, 10)[:, ::2]), (base[:, 1, :37], weight[:37].T)):
        inputs = {"x": x, "weight": w, "targets": targets_for(x.shape[:-1], w.shape[0])}
        check_twin(ops.linear_cross_entropy, reference.linear_cross_entropy, inputs, slack=32)


def test_linear_of_many_rows_and_long_sums(kernels):
    for rows, width, classes in ((300, 1500, 270), (70, 31, 2000)):
        inputs = {"x": torch.randn(rows, width), "weight": torch.randn(classes, width) / width**0.5}
        inputs |= {"bias": torch.randn(classes), "targets": targets_for((rows,), classes)}
        check_twin(ops.linear_cross_entropy, reference.linear_cross_entropy, inputs)


def test_linear_of_numbers_of_any_size(kernels):
    x, weight = torch.randn(40, 64), torch.randn(50, 64)
    targets = torch.randint(50, (40,))
    for size in (1e30, 1e-30):
        inputs = {"x": x * size, "weight": weight / size, "targets": targets}
        check_twin(ops.linear_cross_entropy, reference.linear_cross_entropy, inputs)
    expected = ops.linear_cross_entropy(x, weight, targets, reduction="none")
    for row, value in ((3, torch.inf), (21, -torch.inf), (39, torch.nan)):
        x[row, 5] = value
    for rows in (slice(0, 40), slice(0, 7), slice(3, 4)):
        losses = ops.linear_cross_entropy(x[rows], weight, targets[rows], reduction="none")
        finite = x[rows].isfinite().all(-1)
        assert torch.equal(losses[finite], expected[rows][finite]) and not losses[~finite].isfinite().any()
    bias = torch.zeros(50)
    bias[10:20] = -torch.inf  # masked classes
    x, targets = torch.randn(40, 64), targets % 10
    losses = ops.linear_cross_entropy(x, weight, targets, bias, reduction="none")
    logits = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(losses, torch.nn.functional.cross_entropy(logits, targets, reduction="none"))


def test_linear_with_some_gradients():
    x, w, b, targets = torch.randn(9, 5), torch.randn(11, 5), torch.randn(11), targets_for((9,), 11)
    for which in range(3):
        leaf = (x, w, b)[which].requires_grad_()
        ours, their = (f.linear_cross_entropy(x, w, targets, b) for f in (ops, reference))
        torch.testing.assert_close(*(torch.autograd.grad(2 * loss, leaf)[0] for loss in (ours, their)))
        leaf.requires_grad_(False)


def test_linear_backward_twice():
    x, w, targets = torch.randn(9, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True), targets_for((9,), 11)
    loss = ops.linear_cross_entropy(x, w, targets)
    first = torch.autograd.grad(3 * loss, (x, w), retain_graph=True)
    second = torch.autograd.grad(3 * loss, (x, w))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_same_bits_alone_in_a_batch_and_for_any_threads(dtype, kernels, threads):
    x, w, b = (torch.randn(s).to(dtype).requires_grad_() for s in ((130, 40), (9001, 40), (9001,)))
    targets = targets_for((130,), 9001)
    targets[7:9] = 5
    results = []
    for n in (1, 2, 5):
        threads(n)
        loss = ops.linear_cross_entropy(x, w, targets, b)
        results.append((loss, *torch.autograd.grad(loss, (x, w, b))))
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))
    losses = ops.linear_cross_entropy(x, w, targets, b, reduction="none")
    with torch.no_grad():
        assert torch.equal(ops.linear_cross_entropy(x, w, targets, b), results[0][0])
        assert torch.equal(ops.linear_cross_entropy(x, w, targets, b, reduction="none"), losses)
        for rows in (slice(7, 8), slice(8, 30)):
            assert torch.equal(ops.linear_cross_entropy(x[rows], w, targets[rows], b, reduction="none"), losses[rows])


def test_errors_name_the_argument():
    logits, x, weight = torch.randn(2, 3, 8), torch.randn(2, 3, 4), torch.randn(8, 4)
    good = torch.zeros(2, 3, dtype=torch.int64)
    bad = torch.tensor([[0, 1, 2], [3, 8, 5]])
    for f in (
        lambda t, **o: ops.cross_entropy(logits, t, **o),
        lambda t, **o: ops.linear_cross_entropy(x, weight, t, **o),
    ):
        with pytest.raises(IndexError, match=r"cross_entropy\] targets\[1, 1\] must be in \[0, 8\), but got 8"):
            f(bad)
        with pytest.raises(IndexError, match=r"targets\[0, 0\] must be in \[0, 8\), but got -100"):
            f(good - 100, ignore_index=-1)
        with pytest.raises(ValueError, match=r"targets must have shape \(2, 3\), but got \(3, 2\)"):
            f(good.T)
        with pytest.raises(TypeError, match="targets must be int64 or int32, but got float32"):
            f(good.float())
        with pytest.raises(ValueError, match="reduction must be 'mean', 'sum' or 'none', but got 'max'"):
            f(good, reduction="max")
        with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\], but got 2"):
            f(good, label_smoothing=2.0)
    with pytest.raises(TypeError, match="logits must be float32, bfloat16 or float16, but got int64"):
        ops.cross_entropy(good, good[:, 0])
    with pytest.raises(TypeError, match="weight must be float32, but got bfloat16"):
        ops.linear_cross_entropy(x, weight.bfloat16(), good)
    with pytest.raises(ValueError, match=r"weight must have shape \(8, 4\), but got \(8, 3\)"):
        ops.linear_cross_entropy(x, weight[:, :3], good)
    with pytest.raises(ValueError, match=r"bias must have shape \(8,\), but got \(7,\)"):
        ops.linear_cross_entropy(x, weight, good, torch.randn(7))
