import pytest
import torch
from ops.test_quantized_linear import random_weight
from twins import check_twin

from pyllm import ops, reference

FORMATS = [(8, False, 32), (8, True, 32), (4, False, 32), (4, True, 32), (8, False, 16), (8, True, 16)]
FORMATS += [(8, False, 64), (4, False, 128), (4, True, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "minimums", "group"), FORMATS)
@pytest.mark.parametrize(("shape", "n", "k"), [((), 3, 5), ((4, 7), 70, 33), ((1023,), 5, 64), ((0, 4), 6, 8)])
def test_equals_its_twin(shape, n, k, bits, minimums, group, dtype, isa):
    scales = torch.float16 if dtype == torch.float16 else torch.float32
    weight = random_weight(n, k, bits, minimums, scales, group)
    packed = ops.pack_quantized(weight)
    for ids_dtype in (torch.int64, torch.int32):
        ids = torch.randint(n, shape, dtype=ids_dtype)
        found = ops.quantized_embedding(ids, packed, dtype)
        assert found.dtype == dtype and torch.equal(found, reference.quantized_embedding(ids, weight, dtype))
    check_twin(lambda ids: ops.quantized_embedding(ids, packed),
               lambda ids: reference.quantized_embedding(ids, weight), {"ids": ids})  # fmt: skip


def test_strided_ids(isa):
    weight, ids = random_weight(20, 40, 8, False), torch.randint(20, (6, 10))
    packed = ops.pack_quantized(weight)
    for i in (ids.T, ids[:, ::3], ids[2:4, 1:]):
        assert torch.equal(ops.quantized_embedding(i, packed), weight.dequantize()[i])


def test_errors_name_the_argument():
    packed = ops.pack_quantized(random_weight(100, 40, 8, False))
    with pytest.raises(IndexError, match=r"\[quantized_embedding\] ids\[1\] must be in \[0, 100\), but got 100"):
        ops.quantized_embedding(torch.tensor([99, 100]), packed)
    with pytest.raises(TypeError, match="ids must be int64 or int32, but got float32"):
        ops.quantized_embedding(torch.ones(3), packed)
    with pytest.raises(TypeError, match="out must be float32, bfloat16 or float16, but got int64"):
        ops.quantized_embedding(torch.tensor([1]), packed, torch.int64)
    with pytest.raises(TypeError, match="weight must come from pack_quantized, but got Tensor"):
        ops.quantized_embedding(torch.tensor([1]), torch.ones(2, 2))
