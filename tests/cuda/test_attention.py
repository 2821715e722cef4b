import pytest
import torch
from ops.test_attention import CASES, DTYPES, LENGTHS, OPTIONS, TABLE, in_pages, qkv
from twins import check_twin

import pyllm
from pyllm import ops, reference


def check(inputs, device, slack=32, **options):
    inputs, options = ({k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in d.items()}
                       for d in (inputs, options))  # fmt: skip
    if "segment_ids" in options:
        options["segment_ids"] = tuple(t.to(device) for t in options["segment_ids"])
    check_twin(ops.attention, reference.attention, inputs, slack=slack, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_equals_its_twin(case, options, dtype, device):
    check(qkv(*CASES[case], dtype), device, **OPTIONS[options])


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("dim", [8, 64, 72, 128, 136, 256])
@torch.no_grad()
def test_head_sizes_of_the_matrix_instructions(dim, dtype, device):
    check(qkv(1, 37, 75, 2, 1, dim, dtype), device, causal=True)
    check(qkv(1, 1, 300, 3, 1, dim, dtype), device, causal=True)
    check(qkv(1, 66, 9, 1, 1, 16, dtype, value_dim=dim), device)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_bias_segments_and_lengths(dtype, device):
    for queries in (1, 40):
        inputs = qkv(2, queries, 300, 4, 2, 16, dtype)
        segments = (torch.arange(queries)[None] % 3).repeat(2, 1), (torch.arange(300)[None] % 3).repeat(2, 1)
        for bias in (torch.randn(2, 4, queries, 300), torch.randn(4, 1, 300), torch.randn(300).to(dtype)):
            lengths = torch.tensor([300, 41], dtype=torch.int32)
            check(inputs | {"bias": bias}, device, key_lengths=lengths, causal=True, segment_ids=segments)
        check(inputs, device, return_weights=True, key_lengths=torch.tensor([0, 257]), window=70, softcap=2.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype, device):
    base = torch.randn(2, 9, 70, 3, 24).to(dtype)
    views = (base[:, 0, :, :, :16], base[:, 1, :, :, 8:], base[:, 2, :, :, 3:19], base[:, 3, :, 1:].transpose(2, 3))
    for q in views[:3]:
        for k in views[:3]:
            check({"q": q[:, :20], "k": k, "v": views[2]}, device)


def test_int8_pages_are_not_there(device):
    rows, table = torch.ones(1, 1, 2, 8, device=device), torch.zeros(1, 1, dtype=torch.int32, device=device)
    pages, one = torch.zeros(1, 64, 2, 10, dtype=torch.int8, device=device), torch.ones(1, device=device).long()
    with pytest.raises(NotImplementedError, match=r"\[write_pages\] pages must be of the rows' dtype on a CUDA device"):
        ops.write_pages(pages, rows, table, one[None])
    with pytest.raises(NotImplementedError, match=r"\[attention\] k must be in pages of q's dtype on a CUDA device"):
        ops.attention(rows, pages, pages, key_lengths=one, page_table=table)
    assert not pages.any()


@pytest.mark.parametrize("shape", [(2, 4, 37, 70), (4, 1, 70), (37, 70), (2, 1, 1, 70)])
def test_the_gradient_of_a_bias(shape, device):
    for options in ({"causal": True}, {"softcap": 2.0, "window": 20}):
        check(qkv(2, 37, 70, 4, 2, 8) | {"bias": torch.randn(shape)}, device, **options)
    for dtype in DTYPES[1:]:
        check(qkv(2, 37, 70, 4, 2, 8, dtype) | {"bias": torch.randn(shape).to(dtype)}, device, slack=4, softcap=2.0)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_the_gradient_of_a_bias_over_many_tiles(dtype, device):
    for dim, shape in ((40, (1, 3, 90, 140)), (136, (90, 140)), (8, (1, 1, 1, 140)), (8, (2, 3, 1, 140))):
        inputs = qkv(2, 90, 140, 3, 3, dim, dtype) | {"bias": torch.randn(shape).to(dtype)}
        check(inputs, device, slack=4, causal=True, window=60)


@pytest.mark.parametrize("shape", [(2, 1, 37, 1), (1, 4, 1, 1), (1,), ()])
def test_a_bias_that_is_the_same_for_all_keys_has_no_gradient(shape, device):
    for dtype, atol in ((torch.float32, 1e-4), (torch.float16, 0.1)):
        inputs, bias = qkv(2, 37, 70, 4, 2, 8, dtype), torch.randn(shape, device=device, requires_grad=True)
        ops.attention(**{k: v.to(device) for k, v in inputs.items()}, bias=bias, causal=True).sin().sum().backward()
        torch.testing.assert_close(bias.grad, torch.zeros_like(bias), rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_masks_weights_and_wide_heads(dtype, device):
    segments = (torch.arange(37)[None] % 3).repeat(2, 1), (torch.arange(70)[None] % 3).repeat(2, 1)
    lengths = torch.tensor([70, 33])
    check(qkv(2, 37, 70, 4, 2, 8, dtype), device, segment_ids=segments, key_lengths=lengths, causal=True)
    check(qkv(2, 9, 70, 4, 2, 8, dtype), device, key_lengths=torch.tensor([0, 5]), return_weights=True)
    for dim, value_dim in ((72, 40), (130, 256), (256, 8)):
        check(qkv(1, 20, 35, 2, 1, dim, dtype, value_dim=value_dim), device, causal=True)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("dim", [8, 64, 72, 128, 136, 256])
def test_gradients_of_the_head_sizes_of_the_matrix_instructions(dim, dtype, device):
    check(qkv(1, 70, 75, 2, 1, dim, dtype), device, slack=4, causal=True)
    check(qkv(1, 20, 140, 2, 2, 16, dtype, value_dim=dim), device, slack=4, window=40)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_more_queries_than_keys_and_of_fewer(dtype, device):
    for queries, keys, group in ((150, 40, 1), (33, 150, 3), (1, 70, 8)):
        lengths = torch.tensor([keys, keys // 3])
        for options in ({"causal": True}, {"causal": True, "window": 50}, {"window": 30}, {}):
            check(qkv(2, queries, keys, 2 * group, 2, 16, dtype), device, slack=4, key_lengths=lengths, **options)


def test_gradients_have_the_same_bits_each_time_and_alone(device):
    for dtype in DTYPES:
        q, k, v = (t.to(device) for t in qkv(2, 70, 100, 2, 1, 16, dtype).values())
        dout = torch.randn(2, 70, 2, 16, device=device).to(dtype)

        def gradients(rows, q=q, k=k, v=v, dout=dout):
            leaves = [t[rows].detach().requires_grad_() for t in (q, k, v)]
            ops.attention(*leaves, causal=True).backward(dout[rows])
            return [t.grad for t in leaves]

        together = gradients(slice(0, 2))
        for again in (gradients(slice(0, 2)), map(torch.cat, zip(gradients(slice(0, 1)), gradients(slice(1, 2)),
                                                                 strict=True))):  # fmt: skip
            assert all(map(torch.equal, together, again))


@pytest.mark.parametrize("batch, queries, heads", [(0, 3, 2), (1, 0, 2), (1, 3, 0)])
def test_gradients_of_nothing_are_zeros(batch, queries, heads, device):
    for dtype in DTYPES:
        inputs = qkv(batch, queries, 4, heads, heads, 8, dtype) | {"bias": torch.randn(1, 1, 1, 4)}
        leaves = {k: t.to(device).requires_grad_() for k, t in inputs.items()}
        ops.attention(**leaves).exp().sum().backward()
        assert not any(t.grad.any() for t in leaves.values())


def test_only_the_gradients_that_are_asked_for(device):
    inputs = {k: v.to(device) for k, v in qkv(1, 5, 6, 2, 1, 8).items()}
    for wanted in inputs:
        leaf = inputs[wanted].clone().requires_grad_()
        ops.attention(**(inputs | {wanted: leaf})).sum().backward()
        expected = inputs[wanted].clone().requires_grad_()
        reference.attention(**(inputs | {wanted: expected})).sum().backward()
        torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 40])
@torch.no_grad()
def test_keys_in_pages(queries, dtype, device):
    q, k, v = qkv(3, queries, 530, 4, 2, 16, dtype).values()
    pages = {"k": in_pages(k, TABLE, 11).to(device), "v": in_pages(v, TABLE, 11).to(device)}
    lengths, table = LENGTHS.to(device), TABLE.to(device)
    for options in ({"causal": True}, {"window": 90}, {"bias": torch.randn(4, 1, 530, device=device)}):
        found = ops.attention(q.to(device), **pages, key_lengths=lengths, page_table=table, **options)
        assert torch.equal(
            found, ops.attention(q.to(device), k.to(device), v.to(device), key_lengths=lengths, **options)
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (40, 1), (10, 5)])
@torch.no_grad()
def test_same_bits_whatever_there_is_room_for(heads, kv_heads, dtype, device):
    q, k, v = (t.to(device) for t in qkv(2, 1, 640, heads, kv_heads, 16, dtype).values())
    lengths = torch.tensor([50, 64], device=device)
    few = ops.attention(q, k[:, :64], v[:, :64], key_lengths=lengths)
    assert torch.equal(few, ops.attention(q, k, v, key_lengths=lengths))
    pages = [t.reshape(20, 64, kv_heads, 16) for t in (k, v)]
    table = torch.arange(20, dtype=torch.int32, device=device).view(2, 10)
    assert torch.equal(few, ops.attention(q, *pages, key_lengths=lengths, page_table=table))
    lengths = torch.tensor([500, 130], device=device)
    many = ops.attention(q, *pages, key_lengths=lengths, page_table=table)
    assert torch.equal(many, ops.attention(q, *pages, key_lengths=lengths, page_table=table[:, :8].contiguous()))
    assert torch.equal(many, ops.attention(q, k, v, key_lengths=lengths))
    assert torch.equal(many[1:], ops.attention(q[1:], k[1:], v[1:], key_lengths=lengths[1:]))


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_same_bits_alone_and_in_a_batch(dtype, device):
    for queries in (1, 70):
        q, k, v = (t.to(device) for t in qkv(3, queries, 600, 4, 2, 32, dtype).values())
        together = ops.attention(q, k, v, causal=True)
        for i in range(3):
            one = slice(i, i + 1)
            assert torch.equal(ops.attention(q[one], k[one], v[one], causal=True), together[one])


@torch.no_grad()
def test_what_is_not_a_number_stays_where_it_is(device):
    for dtype in DTYPES:
        q, k, v = (t.to(device) for t in qkv(1, 40, 40, 2, 2, 16, dtype).values())
        q[0, 7, 1, 3] = torch.nan
        out = ops.attention(q, k, v, causal=True)
        assert out[0, 7, 1].isnan().all() and out.isnan().sum() == 16
        clean = ops.attention(q[:, :5], k, v, key_lengths=torch.tensor([30], device=device))
        k[:, 30:] = v[:, 30:] = torch.nan
        assert torch.equal(ops.attention(q[:, :5], k, v, key_lengths=torch.tensor([30], device=device)), clean)


@torch.no_grad()
def test_wrong_lengths_and_pages_are_errors_at_the_next_call(device):
    q, pages = torch.randn(2, 1, 4, 8, device=device), torch.randn(5, 64, 2, 8, device=device)
    table = torch.tensor([[0, 1], [4, 2]], dtype=torch.int32, device=device)
    for lengths, entries, kind, message in (
        ([129, 3], table, ValueError, r"key_lengths, .* must be in \[0, 128\], but got 129 at element 0"),
        ([3, -1], table, ValueError, r"key_lengths, .* must be in \[0, 128\], but got -1 at element 1"),
        ([3, 65], table + 3 * (table == 2), IndexError, r"page_table must be in \[0, 5\), but got 5 at element 3"),
        ([1, 1], table - 1, IndexError, r"page_table must be in \[0, 5\), but got -1 at element 0"),
    ):
        ops.attention(q, pages, pages, key_lengths=torch.tensor(lengths, device=device), page_table=entries.int())
        with pytest.raises(kind, match=message):
            pyllm.synchronize()


@torch.no_grad()
def test_pages_of_bytes_are_refused(device):
    q, pages = torch.randn(1, 1, 2, 8, device=device), torch.zeros(2, 64, 2, 10, dtype=torch.int8, device=device)
    table, lengths = (
        torch.zeros(1, 1, dtype=torch.int32, device=device),
        torch.ones(1, dtype=torch.int32, device=device),
    )
    with pytest.raises(NotImplementedError, match=r"k must be in pages of q's dtype on a CUDA device, but got int8"):
        ops.attention(q, pages, pages, key_lengths=lengths, page_table=table)


@torch.no_grad()
def test_writing_pages(device):
    for dtype in DTYPES:
        for dim, heads in ((8, 2), (5, 3), (16, 1)):
            pages = torch.randn(5, 64, heads, dim, device=device).to(dtype)
            rows = torch.randn(2, 4, heads + 1, dim, device=device).to(dtype)[:, :, 1:]
            table = torch.tensor([[0, 3], [4, 1]], dtype=torch.int32, device=device)
            positions = torch.tensor([[0, 63, 64, 127], [5, 6, 7, 70]], device=device)
            expected = reference.write_pages(pages.clone(), rows, table, positions)
            for p in (positions, positions.int()):
                assert torch.equal(ops.write_pages(pages.clone(), rows, table, p), expected)
    before = pages.clone()
    ops.write_pages(pages, rows, table, positions + 100 * (positions == 127))
    with pytest.raises(IndexError, match=r"\[write_pages\] positions must be in \[0, 128\), but got 227 at element 3"):
        pyllm.synchronize()
    ops.write_pages(pages, rows, table + 5 * (table == 4).int(), positions)
    with pytest.raises(IndexError, match=r"page_table must be in \[0, 5\), but got 9 at element 2"):
        pyllm.synchronize()
    assert torch.equal(pages[2], before[2])


def test_next_positions(device):
    lengths = torch.tensor([1, 3, 0], device=device)
    for ours, theirs in zip(ops.next_positions(lengths, 4, 7), reference.next_positions(lengths, 4, 7), strict=True):
        assert torch.equal(ours, theirs)
    ops.next_positions(lengths, 4, 6)
    with pytest.raises(IndexError, match=r"lengths with the new tokens must be in \[0, 3\), but got 3 at element 1"):
        pyllm.synchronize()
