import pytest
import torch
from twins import check_twin

from pyllm import _C, ops, reference
from pyllm.ops.paging import page_width

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = {  # (batch, queries, keys, heads, key heads, head size)
    "one": (1, 1, 1, 1, 1, 1),
    "primes": (2, 7, 13, 3, 3, 5),
    "blocks": (1, 130, 130, 2, 1, 16),
    "1023 keys": (1, 5, 1023, 4, 2, 33),
    "one query": (2, 1, 600, 8, 2, 64),
    "three queries": (1, 3, 70, 2, 2, 24),
    "no query": (2, 0, 3, 2, 2, 8),
    "no key": (2, 3, 0, 2, 2, 8),
    "no batch": (0, 3, 4, 2, 2, 8),
    "widest": (1, 19, 21, 1, 1, 256),
}
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 9},
    "two-sided window": {"window": 70},
    "softcap": {"softcap": 1.5, "scale": 0.7},
}


def qkv(batch, queries, keys, heads, kv_heads, dim, dtype=torch.float32, value_dim=None):
    shapes = ((batch, queries, heads, dim), (batch, keys, kv_heads, dim), (batch, keys, kv_heads, value_dim or dim))
    return {name: torch.randn(shape).to(dtype) for name, shape in zip("qkv", shapes, strict=True)}


def check(inputs, **options):
    check_twin(ops.attention, reference.attention, inputs, slack=32, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_equals_its_twin(case, options, dtype, kernels):
    check(qkv(*CASES[case], dtype), **OPTIONS[options])


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_another_size(dtype, kernels):
    check(qkv(2, 33, 40, 4, 2, 24, dtype, value_dim=13), causal=True)
    check(qkv(2, 1, 40, 4, 2, 13, dtype, value_dim=40), causal=True)


@pytest.mark.parametrize("shape", [(2, 4, 37, 70), (2, 4, 1, 70), (1, 4, 37, 70), (4, 37, 70), (37, 70), (2, 1, 1, 70)])
def test_bias_and_its_gradient(shape, kernels):
    check(qkv(2, 37, 70, 4, 2, 8) | {"bias": torch.randn(shape)}, causal=True)


@pytest.mark.parametrize("shape", [(37, 1), (1, 4, 1, 1), (1,), ()])
def test_bias_that_is_the_same_for_all_keys_changes_nothing(shape, kernels):
    inputs, bias = qkv(2, 37, 70, 4, 2, 8), torch.randn(shape, requires_grad=True)
    out = ops.attention(**inputs, bias=bias, causal=True)
    torch.testing.assert_close(out, ops.attention(**inputs, causal=True))
    out.sum().backward()
    torch.testing.assert_close(bias.grad, torch.zeros(shape), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_of_one_query_and_with_softcap(dtype, kernels):
    check(qkv(2, 1, 90, 4, 1, 8, dtype) | {"bias": torch.randn(2, 4, 1, 90).to(dtype)}, softcap=2.0)
    check(qkv(2, 20, 90, 4, 1, 8, dtype) | {"bias": torch.randn(4, 90, 20).to(dtype).mT}, softcap=2.0)


def test_bias_of_minus_infinity_masks(kernels):
    inputs = qkv(1, 40, 50, 2, 2, 8)
    mask = torch.rand(40, 50) < 0.5
    mask[:, 0] = True
    bias = torch.zeros(40, 50).masked_fill(~mask, float("-inf"))
    check(inputs, bias=bias)
    bias[3] = float("-inf")
    assert not ops.attention(**inputs, bias=bias)[0, 3].any()


@pytest.mark.parametrize("queries", [1, 3, 90])
@pytest.mark.parametrize("causal", [False, True])
def test_key_lengths(queries, causal, kernels):
    inputs = qkv(4, queries, 90, 4, 2, 16)
    for dtype in (torch.int64, torch.int32):
        check(inputs, key_lengths=torch.tensor([0, 1, 65, 90], dtype=dtype), causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_segment_ids(causal, kernels):
    ids = torch.tensor([0] * 30 + [1] * 80 + [7] * 20).repeat(2, 1)
    ids[1] = torch.randint(0, 3, (130,))
    check(qkv(2, 130, 130, 2, 1, 16), segment_ids=ids, causal=causal)
    check(qkv(2, 50, 130, 2, 1, 16), segment_ids=(ids[:, 40:90].int(), ids.int()), causal=causal)
    check(qkv(2, 1, 130, 2, 1, 16), segment_ids=(ids[:, -1:], ids), causal=causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 80])
def test_weights_and_their_gradient(queries, dtype, kernels):
    options = {"return_weights": True, "causal": True, "key_lengths": torch.tensor([40, 90])}
    check(qkv(2, queries, 90, 4, 2, 16, dtype), **options)


@pytest.mark.parametrize("batch, queries, heads", [(0, 3, 2), (1, 0, 2), (1, 3, 0)])
def test_gradients_of_nothing_are_zeros(batch, queries, heads):
    inputs = qkv(batch, queries, 4, heads, heads, 8) | {"bias": torch.randn(1, 1, 1, 4)}
    for reduce in (torch.sum, lambda out: out.exp().sum()):
        leaves = {k: t.clone().requires_grad_() for k, t in inputs.items()}
        reduce(ops.attention(**leaves)).backward()
        assert not any(t.grad.any() for t in leaves.values())


def test_gradient_of_the_weights_alone():
    q, k, v = (t.requires_grad_() for t in qkv(1, 9, 9, 2, 2, 8).values())
    for weights in (
        ops.attention(q, k, v, return_weights=True)[1],
        reference.attention(q, k, v, return_weights=True)[1],
    ):
        weights.square().sum().backward()
    ours, theirs = (torch.autograd.grad(f.attention(q, k, v, return_weights=True)[1].square().sum(), (q, k)) for f in
                    (ops, reference))  # fmt: skip
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_layouts(kernels):
    base = torch.randn(3, 40, 50, 3)
    k, v = torch.randn(3, 2, 50, 40).transpose(1, 2)[..., 2:38], torch.randn(3, 50, 4, 36)[:, :, ::2]
    for q in (
        base.transpose(1, 3)[:, :, :, :36].transpose(1, 2).transpose(1, 2),
        torch.randn(50, 3, 2, 36).transpose(0, 1),
    ):
        q = q[:, :, :2]
        check({"q": q, "k": k, "v": v}, causal=True)
    qkv_together = torch.randn(2, 20, 3, 4, 8)
    q, k, v = qkv_together.unbind(2)
    check({"q": q, "k": k, "v": v}, causal=True)


def test_only_the_gradients_that_are_asked_for():
    for wanted in ("q", "k", "v", "qk", "kv"):
        inputs = {n: t.requires_grad_(n in wanted) for n, t in qkv(1, 70, 70, 2, 2, 8).items()}
        grads = []
        for f in (ops, reference):
            out = f.attention(**inputs, causal=True)
            grads.append(torch.autograd.grad(out.sin().sum(), [inputs[n] for n in wanted]))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def test_large_scores_do_not_overflow(kernels):
    inputs = qkv(1, 40, 200, 2, 2, 16)
    inputs["q"] *= 1000
    torch.testing.assert_close(ops.attention(**inputs), reference.attention(**inputs), atol=1e-3, rtol=1e-3)


def test_nan_in_a_query_stays_in_its_row():
    inputs = qkv(1, 40, 40, 2, 2, 16)
    inputs["q"][0, 7, 1, 3] = float("nan")
    out = ops.attention(**inputs, causal=True)
    assert out[0, 7, 1].isnan().all() and out.isnan().sum() == 16


# ---- The numerics contract: the same bits.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"window": 200}, {"softcap": 3.0}], ids=str)
def test_full_pass_chunks_and_steps_agree(dtype, options, kernels):
    total = 1100
    inputs = qkv(1, total, total, 4, 2, 40, dtype)
    q, k, v = inputs.values()
    full = ops.attention(q, k, v, causal=True, **options)
    for chunk in (300, 64, 7):
        for t in (0, 290, 600, total - chunk):
            rows = slice(t, t + chunk)
            lengths = torch.tensor([t + chunk])
            assert torch.equal(
                ops.attention(q[:, rows], k[:, : t + chunk], v[:, : t + chunk], causal=True, **options), full[:, rows]
            )
            assert torch.equal(
                ops.attention(q[:, rows], k, v, causal=True, key_lengths=lengths, **options), full[:, rows]
            )
    for t in [*range(0, 80), 511, 512, 513, 700, 1023, 1024, total - 1]:
        step = ops.attention(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], causal=True, **options)
        assert torch.equal(step, full[:, t : t + 1]), t


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, kv_heads, dim", [(3, 3, 64), (2, 1, 96), (7, 1, 32), (12, 1, 64), (4, 1, 40)])
def test_steps_of_groups_of_any_size_agree(heads, kv_heads, dim, dtype, kernels):
    q, k, v = qkv(1, 150, 150, heads, kv_heads, dim, dtype).values()
    full = ops.attention(q, k, v, causal=True)
    for t in range(150):
        assert torch.equal(
            ops.attention(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], causal=True), full[:, t : t + 1]
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_and_segments_agree_in_steps(dtype, kernels):
    q, k, v = qkv(1, 150, 150, 4, 1, 24, dtype).values()
    bias, ids = torch.randn(1, 4, 150, 150), torch.arange(150)[None] // 40
    full = ops.attention(q, k, v, bias=bias, segment_ids=ids, causal=True)
    for t in range(150):
        row, seen = slice(t, t + 1), slice(0, t + 1)
        step = ops.attention(q[:, row], k[:, seen], v[:, seen], bias=bias[:, :, row, seen], causal=True,
                             segment_ids=(ids[:, row], ids[:, seen]))  # fmt: skip
        assert torch.equal(step, full[:, row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 50])
def test_what_lies_beyond_key_lengths_is_not_read(queries, dtype, kernels):
    q, k, v = qkv(2, queries, 100, 4, 2, 32, dtype).values()
    lengths = torch.tensor([37, 80])
    clean = ops.attention(q, k, v, key_lengths=lengths, causal=True)
    for b, n in enumerate(lengths):
        assert torch.equal(clean[b], ops.attention(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n], causal=True)[0])
        k[b, n:] = v[b, n:] = float("nan")
    assert torch.equal(clean, ops.attention(q, k, v, key_lengths=lengths, causal=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 64])
def test_later_keys_are_nothing_to_earlier_queries_even_if_not_finite(dim, dtype, kernels):
    q, k, v = qkv(1, 90, 90, 4, 2, dim, dtype).values()
    clean = ops.attention(q, k, v, causal=True)
    for bad in (float("nan"), float("inf")):
        k[:, 50:] = v[:, 50:] = bad
        assert torch.equal(ops.attention(q, k, v, causal=True)[:, :50], clean[:, :50])
        assert torch.equal(ops.attention(q[:, 49:51], k[:, :51], v[:, :51], causal=True)[:, :1], clean[:, 49:50])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_no_query_of_a_call_sees_is_nothing_to_it_even_if_not_finite(bad, dtype, kernels):
    q, k, v = qkv(1, 3, 90, 64, 1, 32, dtype).values()  # the rows of a query fill whole panels
    for heads in (1, 4, 64):
        for window in (9, 20, 40):
            spoilt = [t.index_fill(1, torch.arange(90 - window), bad) for t in (k, v)]
            last = q[:, 2:, :heads]
            clean = ops.attention(last, k, v, causal=True, window=window)
            assert torch.equal(ops.attention(last, *spoilt, causal=True, window=window), clean)
        spoilt = [t.index_fill(1, torch.tensor([88, 89]), bad) for t in (k, v)]
        clean = ops.attention(q[:, :, :heads], k, v, causal=True)[:, 0]
        assert torch.equal(ops.attention(q[:, :, :heads], *spoilt, causal=True)[:, 0], clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 150, 150, 4, 2, 24), (1, 1, 1100, 2, 1, 32), (1, 600, 600, 1, 1, 16)], ids=str)
def test_same_bits_alone_in_a_batch_and_for_any_threads(shape, dtype, kernels, threads):
    inputs = qkv(*shape, dtype)
    inputs["bias"] = torch.randn(shape[3], 1, shape[2])
    leaves = [t.requires_grad_() for t in inputs.values()]
    results = []
    for n in (1, 2, 5):
        threads(n)
        out, weights = ops.attention(**inputs, causal=True, return_weights=True)
        results.append((out, weights, *torch.autograd.grad(out.sin().sum() + weights.cos().sum(), leaves)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    q, k, v, bias = leaves
    last = shape[0] - 1
    alone = [t[last:].detach().requires_grad_() for t in (q, k, v)]
    out, weights = ops.attention(*alone, bias=bias, causal=True, return_weights=True)
    assert torch.equal(out[0], results[0][0][last]) and torch.equal(weights[0], results[0][1][last])
    grads = torch.autograd.grad(out.sin().sum() + weights.cos().sum(), alone)
    assert all(torch.equal(a[0], b[last]) for a, b in zip(grads, results[0][2:5], strict=True))


def in_pages(t, table, count, page_size=64):
    """t (B, T, H, D) as `count` pages; what no sequence fills is not a number."""
    pages = torch.full((count, page_size, *t.shape[2:]), float("nan"), dtype=t.dtype)
    for row, entries in zip(t, table, strict=True):
        for part, page in zip(row.split(page_size), entries, strict=False):
            if page >= 0:
                pages[page, : len(part)] = part
    return pages


LENGTHS = torch.tensor([530, 70, 0])
TABLE = torch.full((3, 9), -7, dtype=torch.int32)  # entries that no length reaches name no page
TABLE[0], TABLE[1, :2] = torch.tensor([3, 10, 0, 7, 2, 9, 1, 6, 4]), torch.tensor([5, 8])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("queries", [1, 3, 40])
def test_keys_in_pages_give_the_bits_of_keys_in_a_row(queries, options, dtype, kernels, threads):
    q, k, v = qkv(3, queries, 576, 4, 2, 20, dtype, value_dim=13).values()
    pages = [in_pages(t, TABLE, 11) for t in (k[:, :530], v[:, :530])]
    for n in (1, 2):
        threads(n)
        for lengths in (LENGTHS, LENGTHS.int()):
            expected = ops.attention(q, k, v, key_lengths=lengths, return_weights=True, **OPTIONS[options])
            found = ops.attention(q, *pages, key_lengths=lengths, page_table=TABLE, return_weights=True,
                                  **OPTIONS[options])  # fmt: skip
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("queries", [1, 40])
def test_keys_in_pages_of_another_size_with_bias_and_segments(queries, kernels):
    q, k, v = qkv(2, queries, 384, 4, 2, 16).values()
    lengths, table = torch.tensor([300, 129]), torch.tensor([[4, 0, 2], [1, 5, 3]], dtype=torch.int32)[:, :3]
    pages = [in_pages(t, table, 6, page_size=128) for t in (k, v)]
    ids = (torch.arange(queries)[None] % 3).repeat(2, 1), (torch.arange(384)[None] % 3).repeat(2, 1)
    for keys in (300, 384, 1):
        options = {"bias": torch.randn(4, queries, keys), "segment_ids": ids, "key_lengths": lengths, "causal": True}
        full = options | {"bias": torch.nn.functional.pad(options["bias"], (0, (384 - keys) * (keys > 1)))}
        assert torch.equal(ops.attention(q, *pages, page_table=table, **options), ops.attention(q, k, v, **full))


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 40])
def test_pages_equal_their_twin(queries, dtype, kernels):
    q, k, v = qkv(3, queries, 530, 4, 2, 16, dtype).values()
    inputs = {"q": q, "k": in_pages(k, TABLE, 11).nan_to_num(), "v": in_pages(v, TABLE, 11).nan_to_num()}
    for options in ({"causal": True}, {"window": 9, "bias": torch.randn(4, 1, 530)}, {"return_weights": True}):
        check(inputs, key_lengths=LENGTHS, page_table=TABLE, **options)


def int8_pages(t, table, count):
    """t (B, T, H, D) as int8 pages, and what they stand for, in as many float32 pages."""
    shape = count, 64, t.shape[2], page_width(t.shape[3], torch.int8)
    pages = torch.full(shape, -1, dtype=torch.int8)  # scales that are not numbers
    positions = torch.arange(t.shape[1]).repeat(len(t), 1)
    for row, entries, own in zip(t.split(1), table.split(1), positions.split(1), strict=True):
        reached = int((entries >= 0).sum()) * 64
        ops.write_pages(pages, row[:, :reached], entries, own[:, :reached])
    return pages, reference.paging.numbers(pages)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("queries", [1, 3, 40])
def test_int8_pages_give_the_bits_of_the_floats_they_stand_for(queries, options, dtype, kernels, threads):
    """Or, in whole numbers, come near to them."""
    whole = _C.info()["isa"] == "avx512" and _C.info()["vnni"]
    for heads, kv_heads, dim, value_dim in ((4, 2, 20, 13), (9, 1, 64, 96), (2, 2, 33, 128), (3, 3, 36, 16)):
        q, k, v = qkv(3, queries, 530, heads, kv_heads, dim, dtype, value_dim).values()
        (k, of_k), (v, of_v) = (int8_pages(t, TABLE, 11) for t in (k, v))
        given = {"key_lengths": LENGTHS, "page_table": TABLE, "return_weights": True} | OPTIONS[options]
        results = []
        for n in (1, 2):
            threads(n)
            found, expected = ops.attention(q, k, v, **given), ops.attention(q.float(), of_k, of_v, **given)
            if whole and dim % 4 == value_dim % 16 == 0:
                rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
                torch.testing.assert_close(found[0].float(), expected[0], atol=4e-4 + 2 * rounding, rtol=rounding)
            else:
                assert all(torch.equal(a, b.to(dtype)) for a, b in zip(found, expected, strict=True))
            results.append(found)
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize("heads", [2, 4, 10, 36])
@pytest.mark.parametrize("dim", [8, 48, 64, 72])
def test_int8_pages_agree_in_steps(dim, heads, kernels):
    q, k, v = qkv(1, 150, 150, heads, 2, dim).values()
    k[0, 20, 0, 1], v[0, 100, 1, 0], v[0, 20, 0, -1] = 3e4, float("inf"), 1e-30
    table = torch.tensor([[2, 0, 1]], dtype=torch.int32)
    (k, _), (v, _) = (int8_pages(t, table, 3) for t in (k, v))
    bias, window = torch.randn(heads, 1, 192), {"page_table": table, "causal": True, "window": 90}
    for given in ({"page_table": table, "causal": True}, window | {"bias": bias}, window | {"softcap": 3.0}):
        full = ops.attention(q, k, v, key_lengths=torch.tensor([150]), **given)
        assert full[:, :100].isfinite().all() and not full[:, 100:110].isfinite().all()
        for first, last in ((0, 1), (63, 64), (64, 71), (99, 101), (149, 150)):
            row = slice(first, last)
            step = ops.attention(q[:, row], k, v, key_lengths=torch.tensor([last]), **given)
            assert torch.equal(step.nan_to_num(7), full[:, row].nan_to_num(7))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_query_that_is_not_finite_stays_in_its_row_over_int8_pages(bad, kernels):
    q, k, v = qkv(1, 40, 128, 4, 2, 64).values()
    given = {"page_table": torch.tensor([[1, 0]], dtype=torch.int32), "key_lengths": torch.tensor([128])}
    (k, _), (v, _) = (int8_pages(t, given["page_table"], 2) for t in (k, v))
    expected = ops.attention(q, k, v, **given)
    q[0, 7, 1, 3] = bad
    expected[0, 7, 1] = float("nan")
    torch.testing.assert_close(ops.attention(q, k, v, **given), expected, atol=0, rtol=0, equal_nan=True)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 40])
def test_int8_pages_equal_their_twin(queries, dtype, kernels):
    q, k, v = qkv(3, queries, 530, 4, 2, 40, dtype).values()
    inputs = {"q": q, "k": int8_pages(k, TABLE, 11)[0], "v": int8_pages(v, TABLE, 11)[0]}
    inputs = inputs | {name: inputs[name].where(inputs[name] != -1, torch.zeros(1, dtype=torch.int8)) for name in "kv"}
    for options in ({"causal": True}, {"window": 9, "bias": torch.randn(4, 1, 530)}, {"return_weights": True}):
        check(inputs, key_lengths=LENGTHS, page_table=TABLE, **options)


def test_int8_pages_are_checked():
    q, pages = torch.randn(2, 3, 4, 31), torch.zeros(5, 64, 2, 33, dtype=torch.int8)
    table, lengths = torch.tensor([[0, 1], [4, 2]], dtype=torch.int32), torch.tensor([64, 65])
    good = {"q": q, "k": pages, "v": pages, "page_table": table, "key_lengths": lengths}
    assert ops.attention(**good).shape == q.shape
    wide = pages.new_zeros(5, 64, 2, 35)
    for error, message, arguments in (
        (TypeError, "v must be int8, but got float32", {"v": torch.zeros(5, 64, 2, 31)}),
        (TypeError, "v must be float32, but got int8", {"k": torch.zeros(5, 64, 2, 31)}),
        (TypeError, "k must be float32, but got int8", {"page_table": None}),
        (ValueError, r"k must have shape \(5, 64, 2, 33\), but got \(5, 64, 2, 35\)", {"k": wide}),
        (ValueError, r"v must have shape \(5, 64, 2, 33\), but got \(5, 64, 2, 35\)", {"v": wide}),
        (ValueError, "v must have a head size of 1 to 256, but got 257", {"v": pages.new_zeros(5, 64, 2, 275)}),
        (ValueError, "k must be contiguous", {"k": pages.new_zeros(5, 64, 4, 33)[:, :, :2]}),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            ops.attention(**(good | arguments))


def test_pages_are_checked():
    q, pages = torch.randn(2, 3, 4, 8), torch.randn(5, 64, 2, 8)
    table, lengths = torch.tensor([[0, 1], [4, 2]], dtype=torch.int32), torch.tensor([64, 65])
    good = {"q": q, "k": pages, "v": pages, "page_table": table, "key_lengths": lengths}
    ops.attention(**good)
    for error, message, arguments in (
        (IndexError, r"page_table\[1, 0\] must be in \[0, 5\), but got 5", {"page_table": table + (table == 4).int()}),
        (IndexError, r"page_table\[0, 0\] must be in \[0, 5\), but got -1", {"page_table": table - 1}),
        (TypeError, "key_lengths must be given with a page_table", {"key_lengths": None}),
        (ValueError, "key_lengths must be 0 to 128, but got 129 at 0", {"key_lengths": lengths + 65}),
        (ValueError, r"page_table must have shape \(2, 2\), but got \(1, 2\)", {"page_table": table[:1]}),
        (ValueError, r"page_table must have 2 dimension\(s\), but got shape \(2,\)", {"page_table": table[0]}),
        (TypeError, "page_table must be int32, but got int64", {"page_table": table.long()}),
        (ValueError, "a page of k must have a multiple of 64 positions, but got 63", {"k": pages[:, :63]}),
        (ValueError, r"v must have shape \(5, 64, 2, 8\), but got \(4, 64, 2, 8\)", {"v": pages[:4]}),
        (ValueError, r"bias must broadcast to \(2, 4, 3, 65\), but got \(64,\)", {"bias": torch.zeros(64)}),
        (ValueError, "page_table is for inference", {"q": q.clone().requires_grad_()}),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            ops.attention(**(good | arguments))


def test_errors_name_the_argument():
    q, k, v = qkv(2, 5, 7, 4, 2, 8).values()
    for error, message, arguments in (
        (ValueError, r"k must have shape \(2, 7, 2, 8\), but got \(2, 7, 2, 6\)", {"k": k[..., :6]}),
        (ValueError, r"v must have shape \(2, 7, 2, 8\), but got \(2, 6, 2, 8\)", {"v": v[:, :6]}),
        (ValueError, r"q must have 4 dimensions \(B, T, H, D\), but got \(5, 4, 8\)", {"q": q[0]}),
        (ValueError, "heads must be a positive multiple of k's 2, but got 3", {"q": q[:, :, :3]}),
        (ValueError, "heads must be a positive multiple of k's 2, but got 0", {"q": q[:, :, :0]}),
        (TypeError, "k must be float32, but got bfloat16", {"k": k.bfloat16()}),
        (TypeError, "q must be float32, bfloat16 or float16, but got int64", {"q": q.long()}),
        (ValueError, "window must be 1 or more, but got 0", {"window": 0}),
        (ValueError, "softcap must be positive, but got -1", {"softcap": -1.0}),
        (ValueError, r"bias must broadcast to \(2, 4, 5, 7\), but got \(5, 6\)", {"bias": torch.zeros(5, 6)}),
        (TypeError, "bias must be float32, bfloat16 or float16, but got bool", {"bias": torch.ones(5, 7).bool()}),
        (ValueError, "key_lengths must be 0 to 7, but got 8 at 1", {"key_lengths": torch.tensor([7, 8])}),
        (ValueError, r"key_lengths must have shape \(2,\)", {"key_lengths": torch.tensor([7])}),
        (TypeError, "key_lengths must be int64 or int32", {"key_lengths": torch.tensor([7.0, 8.0])}),
        (ValueError, r"segment_ids of the keys must have shape \(2, 7\)", {"segment_ids": torch.zeros(2, 5).long()}),
        (TypeError, "segment_ids of the queries must be int64 or int32", {"segment_ids": torch.zeros(2, 5)}),
    ):
        with pytest.raises(error, match=message):
            ops.attention(**({"q": q, "k": k, "v": v} | arguments))
    wide = torch.zeros(1, 2, 1, 257)
    with pytest.raises(ValueError, match="q must have a head size of 1 to 256, but got 257"):
        ops.attention(wide, wide, wide)
