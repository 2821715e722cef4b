import pytest
import torch

from pyllm import ops, reference
from pyllm.ops.paging import head_size, page_width

TABLE = torch.tensor([[3, 1, -1], [0, 4, 2]], dtype=torch.int32)
POSITIONS = torch.tensor([[0, 63, 64, 127, 1], [130, 5, 65, 64, 191]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 5, 3, 7), (2, 1, 1, 1), (2, 0, 3, 7), (0, 3, 2, 4), (2, 5, 0, 4)])
def test_writes_what_its_twin_writes(shape, dtype, isa):
    batch, time = shape[:2]
    pages, rows = torch.randn(5, 64, *shape[2:]).to(dtype), torch.randn(shape).to(dtype)
    expected = pages.clone()
    for kind in (torch.int64, torch.int32):
        given = (TABLE[:batch], POSITIONS[:batch, :time].to(kind))
        reference.write_pages(expected, rows, *given)
        assert ops.write_pages(pages, rows, *given) is pages
        assert torch.equal(pages, expected)
        rows = rows + 1


def test_layouts(isa, threads):
    table = torch.randperm(2 * 40)[:80].view(2, 40).int()
    positions = torch.stack([torch.randperm(2560)[:700] for _ in range(2)])
    for rows in (torch.randn(2, 700, 9, 8)[:, :, 2:6], torch.randn(2, 4, 700, 8).transpose(1, 2),
                 torch.randn(2, 700, 8, 4).mT, torch.randn(2, 1, 4, 8).expand(2, 700, 4, 8)):  # fmt: skip
        expected = reference.write_pages(torch.zeros(80, 64, 4, 8), rows, table, positions)
        for n in (1, 2, 5):
            threads(n)
            assert torch.equal(ops.write_pages(torch.zeros(80, 64, 4, 8), rows, table, positions), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [1, 7, 31, 32, 33, 64, 80, 256])
def test_int8_pages_are_those_of_its_twin(dim, dtype, isa, threads):
    pages = torch.randint(-128, 128, (5, 64, 3, page_width(dim, torch.int8)), dtype=torch.int8)
    assert head_size(pages) == dim
    rows = (torch.randn(2, 5, 3, dim) * torch.logspace(-9, 4, 30).view(2, 5, 3, 1)).to(dtype)
    rows[0, 1], rows[0, 2], rows[1, 0, 1, 0] = 0.0, -1e-40, float("inf")
    rows[1, 1, 2, -1] = float("nan")
    expected = reference.write_pages(pages.clone(), rows, TABLE, POSITIONS)
    threads(2)
    for own in (rows, rows.transpose(1, 2).contiguous().transpose(1, 2), rows.mT.contiguous().mT):
        assert torch.equal(ops.write_pages(pages.clone(), own, TABLE, POSITIONS), expected)
    said = reference.paging.numbers(expected)[TABLE.gather(1, POSITIONS // 64), POSITIONS % 64]
    for got, row in zip(said.split(32, -1), rows.float().split(32, -1), strict=True):
        finite = row.isfinite().all(-1)
        assert got[~finite].isnan().all()
        bound = row.abs().amax(-1, keepdim=True) / 127 * (0.5 + 2**-7) + 1e-40
        assert ((got - row).abs() <= bound)[finite].all()


def test_bad_int8_pages():
    rows, bytes = torch.ones(2, 5, 2, 31), torch.zeros(5, 64, 2, 33, dtype=torch.int8)
    for error, message, pages, given in (
        (ValueError, r"rows must have shape \(2, 5, 2, 31\), but got \(2, 5, 2, 30\)", bytes, rows[..., :30]),
        (TypeError, "rows must be float32, bfloat16 or float16, but got int8", bytes, rows.to(torch.int8)),
        (ValueError, "pages must have 33 bytes for a head of 31, but got 35", bytes.new_zeros(5, 64, 2, 35), rows),
        (TypeError, "pages must be float32, bfloat16 or float16, but got uint8", bytes.view(torch.uint8), rows),
        (ValueError, "a page of int8 must have a multiple of 64 positions, but got 32", bytes[:, :32].clone(), rows),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            ops.write_pages(pages, given, TABLE, POSITIONS)
        assert not pages.any()


def test_bad_writes_change_nothing():
    pages, rows = torch.zeros(5, 64, 2, 4), torch.ones(2, 5, 2, 4)
    high = TABLE + (TABLE == 4).int()
    beyond, unnamed = POSITIONS + (POSITIONS == 191), POSITIONS + 64 * (POSITIONS == 127)
    for error, message, arguments in (
        (IndexError, r"positions\[1, 4\] must be in \[0, 192\), but got 192", (rows, TABLE, beyond)),
        (IndexError, r"positions\[0, 0\] must be in \[0, 192\), but got -1", (rows, TABLE, POSITIONS - 1)),
        (IndexError, r"page_table\[0, 2\] must be in \[0, 5\), but got -1", (rows, TABLE, unnamed)),
        (IndexError, r"page_table\[1, 1\] must be in \[0, 5\), but got 5", (rows, high, POSITIONS)),
        (ValueError, r"rows must have shape \(2, 5, 2, 4\), but got \(2, 5, 2, 3\)", (rows[..., :3], TABLE, POSITIONS)),
        (ValueError, r"positions must have shape \(2, 5\), but got \(2, 4\)", (rows, TABLE, POSITIONS[:, :4])),
        (ValueError, r"page_table must have shape \(2, 3\), but got \(1, 3\)", (rows, TABLE[:1], POSITIONS)),
        (TypeError, "rows must be float32, but got bfloat16", (rows.bfloat16(), TABLE, POSITIONS)),
        (TypeError, "page_table must be int32, but got int64", (rows, TABLE.long(), POSITIONS)),
        (TypeError, "positions must be int64 or int32, but got float32", (rows, TABLE, POSITIONS.float())),
        (ValueError, "has no gradients", (rows.clone().requires_grad_(), TABLE, POSITIONS)),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            ops.write_pages(pages, *arguments)
    assert not pages.any()
    with pytest.raises(ValueError, match="pages must be contiguous"):
        ops.write_pages(torch.zeros(5, 64, 4, 4)[:, :, ::2], rows, TABLE, POSITIONS)


@pytest.mark.parametrize("lengths", [[3], [0, 7, 5], []])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_next_positions(lengths, count):
    lengths = torch.tensor(lengths, dtype=torch.int64)
    for a, b in zip(ops.next_positions(lengths, count, 10), reference.next_positions(lengths, count, 10), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype


def test_positions_beyond_the_capacity_are_an_error():
    with pytest.raises(ValueError, match="the state holds 5 positions, but got 2 tokens after 4, in row 1"):
        ops.next_positions(torch.tensor([3, 4]), 2, 5)
    with pytest.raises(ValueError, match="lengths must be 0 or more, but got -1 at 0"):
        ops.next_positions(torch.tensor([-1]), 2, 5)
    with pytest.raises(ValueError, match="count must be 0 or more, but got -1"):
        ops.next_positions(torch.tensor([1]), -1, 5)
    with pytest.raises(TypeError, match="lengths must be int64, but got int32"):
        ops.next_positions(torch.tensor([1]).int(), 1, 5)
