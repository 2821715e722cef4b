"""Attention of many queries with sm_90's own instructions (PYLLM_CUDA_WGMMA=1)."""

import os
import subprocess
import sys

import pytest
import torch
from ops.test_attention import DTYPES, in_pages, qkv
from twins import check_twin

import pyllm
from pyllm import _C, ops, reference

EMULATED = _C.info()["cuda_emulated"]
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 50},
    "two-sided window": {"window": 70},
    "softcap": {"causal": True, "softcap": 1.5, "scale": 0.7},
}


@pytest.fixture
def wgmma(device):
    """Where to put tensors; until the end of the test, attention takes the kernel if it can."""
    if not EMULATED and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")
    _C._set_wgmma(True)
    yield device
    _C._set_wgmma(False)


def taken(f):
    """The result of f(), which may be by the kernel or not: which of them, an emulator has counted."""
    before = _C._emulated_products() if EMULATED else 0
    result = f()
    return result, EMULATED and _C._emulated_products() > before


def check(inputs, device, **options):
    inputs = {k: v.to(device) for k, v in inputs.items()}
    _, by_kernel = taken(lambda: check_twin(ops.attention, reference.attention, inputs, slack=32, **options))
    assert by_kernel or not EMULATED


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_equals_its_twin_at_awkward_lengths(options, dtype, wgmma):
    for queries, keys in ((65, 1), (66, 63), (127, 64), (129, 65), (97, 127), (128, 129), (131, 257), (70, 521)):
        check(qkv(1, queries, keys, 1, 1, 16, dtype), wgmma, **OPTIONS[options])


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("dim", [8, 64, 72, 96, 128, 136, 256])
@torch.no_grad()
def test_head_sizes(dim, dtype, wgmma):
    check(qkv(1, 70, 150, 1, 1, dim, dtype), wgmma, causal=True)
    check(qkv(1, 70, 300, 1, 1, dim, dtype, value_dim=264 - dim), wgmma)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("heads, kv_heads, queries", [(4, 2, 70), (3, 1, 50), (7, 1, 37), (10, 2, 29), (128, 1, 2)])
@torch.no_grad()
def test_groups_of_heads(heads, kv_heads, queries, dtype, wgmma):
    check(qkv(2, queries, 140, heads, kv_heads, 16, dtype), wgmma, causal=True)
    check(qkv(1, queries, 40, heads, kv_heads, 16, dtype), wgmma, causal=True, window=30)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_gradients(dtype, wgmma):
    check(qkv(1, 70, 90, 2, 1, 16, dtype), wgmma, causal=True)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@torch.no_grad()
def test_what_lies_beyond_a_length_is_not_read(dtype, wgmma):
    q, k, v = (t.to(wgmma) for t in qkv(4, 80, 300, 1, 1, 72, dtype).values())
    lengths = torch.tensor([300, 129, 7, 0], device=wgmma)
    for i, n in enumerate(lengths.tolist()):
        k[i, n:] = v[i, n:] = torch.nan
    for options in ({}, {"causal": True}, {"window": 60}):
        out, by_kernel = taken(lambda options=options: ops.attention(q, k, v, key_lengths=lengths, **options))
        assert by_kernel or not EMULATED
        assert not out[3].any()
        for i, n in enumerate(lengths.tolist()[:3]):
            one = [t[i : i + 1, :rows].contiguous() for t, rows in ((q, 80), (k, n), (v, n))]
            assert torch.equal(out[i : i + 1], ops.attention(*one, **options))


@torch.no_grad()
def test_what_is_not_a_number_stays_in_its_row(wgmma):
    for dtype in DTYPES[1:]:
        q, k, v = (t.to(wgmma) for t in qkv(1, 140, 140, 2, 2, 16, dtype).values())
        q[0, 77, 1, 3] = torch.nan
        out = ops.attention(q, k, v, causal=True)
        assert out[0, 77, 1].isnan().all() and out.isnan().sum() == 16


@pytest.mark.parametrize("dtype", DTYPES[1:])
@torch.no_grad()
def test_layouts(dtype, wgmma):
    base = torch.randn(2, 3, 3, 90, 32).to(dtype).to(wgmma)
    views = (base[:, 0].transpose(1, 2), base[:, 1, :, :, 8:24].transpose(1, 2), base[:, 2, 0, :, None, 16:])
    check({"q": views[0][..., :16], "k": views[1], "v": views[1]}, wgmma, causal=True)
    check({"q": views[1], "k": views[2], "v": views[2]}, wgmma)
    check({"q": views[1][:1], "k": views[0][1:, :50, :, 16:], "v": views[0][1:, 40:]}, wgmma)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@torch.no_grad()
def test_same_bits_alone_in_a_batch_and_with_room(dtype, wgmma):
    q, k, v = (t.to(wgmma) for t in qkv(3, 70, 260, 4, 2, 32, dtype).values())
    together = ops.attention(q, k, v, causal=True)
    for i in range(3):
        one = slice(i, i + 1)
        assert torch.equal(ops.attention(q[one], k[one], v[one], causal=True), together[one])
    lengths = torch.tensor([200, 100, 260], device=wgmma)
    out = ops.attention(q, k, v, key_lengths=lengths)
    assert torch.equal(out[:1], ops.attention(q[:1], k[:1, :200], v[:1, :200]))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("dim, page_size", [(24, 64), (136, 192)])
@torch.no_grad()
def test_keys_in_pages(dim, page_size, dtype, wgmma):
    q, k, v = (t.to(wgmma) for t in qkv(3, 70, 384, 2, 1, dim, dtype).values())
    table = torch.arange(3 * 384 // page_size).flip(0).view(3, -1).int()
    lengths = torch.tensor([383, 65, 0])
    for row, n in zip(table, lengths.tolist(), strict=True):
        row[-(-n // page_size) :] = -7  # no page, and nobody asks for it
    pages = [in_pages(t.cpu(), table, 18, page_size).to(wgmma) for t in (k, v)]
    lengths, table = lengths.to(wgmma), table.to(wgmma)
    for options in ({"causal": True}, {"window": 90}):
        found, by_kernel = taken(lambda o=options: ops.attention(q, *pages, key_lengths=lengths, page_table=table, **o))
        assert by_kernel or not EMULATED
        assert torch.equal(found, ops.attention(q, k, v, key_lengths=lengths, **options))


@torch.no_grad()
def test_wrong_lengths_and_pages_are_errors_at_the_next_call(wgmma):
    q, pages = torch.randn(2, 70, 1, 8, device=wgmma).half(), torch.randn(5, 64, 1, 8, device=wgmma).half()
    table = torch.tensor([[0, 1], [4, 2]], dtype=torch.int32, device=wgmma)
    for lengths, entries, kind, message in (
        ([129, 3], table, ValueError, r"key_lengths, .* must be in \[0, 128\], but got 129 at element 0"),
        ([3, 65], table + 3 * (table == 2), IndexError, r"page_table must be in \[0, 5\), but got 5 at element 3"),
        ([1, 1], table - 1, IndexError, r"page_table must be in \[0, 5\), but got -1 at element 0"),
    ):
        out = ops.attention(q, pages, pages, key_lengths=torch.tensor(lengths, device=wgmma), page_table=entries.int())
        with pytest.raises(kind, match=message):
            pyllm.synchronize()
        assert out.isfinite().all()


@torch.no_grad()
def test_the_rest_is_left_to_the_other_kernels(wgmma):
    def results(q, k, v, **options):
        found = []
        for wanted in (True, False):
            _C._set_wgmma(wanted)
            out, by_kernel = taken(lambda: ops.attention(q, k, v, **options))
            assert not by_kernel
            found.append(out)
        assert torch.equal(*found)

    def inputs(*shape, **options):
        return [t.to(wgmma) for t in qkv(*shape, torch.bfloat16, **options).values()]

    q, k, v = inputs(1, 70, 70, 2, 1, 16)
    results(q, k, v, bias=torch.randn(70, 70, device=wgmma))
    results(q, k, v, segment_ids=torch.zeros(1, 70, dtype=torch.int64, device=wgmma))
    results(q, k, v, scale=-1.0)
    results(q.float(), k.float(), v.float())
    results(q[:, :32], k, v)  # few rows
    results(q, k[:, :0], v[:, :0])
    results(q, k.expand(1, 70, 2, 16), v.expand(1, 70, 2, 16))  # steps of 0
    results(*inputs(1, 70, 70, 2, 1, 12))
    results(*inputs(1, 1, 70, 130, 1, 16))  # a group of more heads than a tile has rows


@pytest.mark.skipif(not _C.info()["cuda_built"], reason="of builds with CUDA")
def test_it_must_be_asked_for():
    load = (f"import importlib.util as u; s = u.spec_from_file_location('_C', {_C.__file__!r}); "
            "s.loader.exec_module(u.module_from_spec(s))")  # fmt: skip
    for wanted, error in (("0", ""), ("1", ""), ("yes", "PYLLM_CUDA_WGMMA must be 0 or 1, but got yes")):
        environment = os.environ | {"PYLLM_CUDA_WGMMA": wanted}
        done = subprocess.run([sys.executable, "-c", load], env=environment, capture_output=True, text=True)
        assert (done.returncode != 0) == bool(error) and error in done.stderr
