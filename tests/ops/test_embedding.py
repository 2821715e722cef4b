import pytest
import torch
from twins import check_twin

from pyllm import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(
    ("shape", "vocabulary", "width"),
    [((), 3, 5), ((1,), 1, 1), ((4, 7), 10, 33), ((1023,), 5, 64), ((3, 1, 2), 2049, 17), ((0, 4), 6, 8), ((5,), 3, 0),
     ((200,), 70001, 3), ((64,), 300, 200)],
)  # fmt: skip
def test_equals_its_twin(shape, vocabulary, width, ids_dtype, dtype, isa):
    inputs = {
        "ids": torch.randint(vocabulary, shape, dtype=ids_dtype),
        "weight": torch.randn(vocabulary, width).to(dtype),
    }
    # The twin sums bf16 gradients in bf16: a bound on its error would be loose, ours is that of one rounding.
    check_twin(ops.embedding, reference.embedding, inputs)


def test_layouts(isa):
    ids = torch.randint(20, (6, 10))
    for i in (ids.T, ids[:, ::3], ids[2:4, 1:]):
        for weight in (torch.randn(20, 9), torch.randn(9, 20).T, torch.randn(20, 30)[:, 4:13]):
            check_twin(ops.embedding, reference.embedding, {"ids": i, "weight": weight})


def test_a_gradient_of_few_rows_in_a_large_vocabulary(isa):
    ids = torch.tensor([39999, 0, 7, 7, 12345])
    check_twin(ops.embedding, reference.embedding, {"ids": ids, "weight": torch.randn(40000, 64)})


def test_gradients_with_strides():
    ids, weight = torch.randint(9, (4, 5)), torch.randn(9, 6, requires_grad=True)
    for spread in (lambda y: y.sum(), lambda y: (y.transpose(0, 1) * 2).sum(), lambda y: y[..., 1:].sum()):
        ours, their = (
            torch.autograd.grad(spread(f(ids, weight)), weight)[0] for f in (ops.embedding, reference.embedding)
        )
        torch.testing.assert_close(ours, their)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [3, 4000])
def test_same_bits_for_any_threads(vocabulary, dtype, isa, threads):
    ids = torch.randint(vocabulary, (5000,))
    weight, dy = torch.randn(vocabulary, 96).to(dtype).requires_grad_(), torch.randn(5000, 96).to(dtype)
    results = []
    for n in (1, 2, 5):
        threads(n)
        results.append(torch.autograd.grad(ops.embedding(ids, weight), weight, dy)[0])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_errors_name_the_argument():
    weight = torch.randn(100, 4, requires_grad=True)
    for w in (weight, weight.detach()):
        with pytest.raises(IndexError, match=r"\[embedding\] ids\[1, 2\] must be in \[0, 100\), but got 100"):
            ops.embedding(torch.tensor([[0, 1, 2], [3, 4, 100]]), w)
        with pytest.raises(IndexError, match=r"ids\[0\] must be in \[0, 100\), but got -1"):
            ops.embedding(torch.tensor([-1], dtype=torch.int32), w)
        with pytest.raises(TypeError, match="ids must be int64 or int32, but got float32"):
            ops.embedding(torch.ones(3), w)
    with pytest.raises(ValueError, match="weight must have 2 dimension"):
        ops.embedding(torch.tensor([0]), torch.randn(3))
    with pytest.raises(TypeError, match="weight must be float32, bfloat16 or float16"):
        ops.embedding(torch.tensor([0]), torch.ones(3, 4, dtype=torch.int64))
