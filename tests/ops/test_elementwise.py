import pytest
import torch

from pyllm import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TORCH = {"add": "add", "subtract": "sub", "multiply": "mul", "divide": "div"}
BINARY = list(TORCH)
SHAPES = [
    ((), ()),
    ((1,), (1023,)),
    ((3, 7), (3, 1)),
    ((2, 5, 33), (33,)),
    ((9001,), ()),
    ((4, 1, 3), (5, 1)),
    ((0, 4), (4,)),
    ((4, 0), (1, 1)),
    ((2, 9000), (2, 9000)),
]


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7), b.nan_to_num(7))


@pytest.mark.parametrize("b_dtype", DTYPES)
@pytest.mark.parametrize("a_dtype", DTYPES)
@pytest.mark.parametrize("kind", BINARY)
def test_arithmetic_has_torchs_bits(kind, a_dtype, b_dtype, isa):
    for a_shape, b_shape in SHAPES:
        a, b = torch.randn(a_shape).mul(3).to(a_dtype), torch.randn(b_shape).to(b_dtype)
        assert same(ops.elementwise(kind, a, b), reference.elementwise(kind, a, b))
        if a_dtype == b_dtype:
            assert same(ops.elementwise(kind, a, b), getattr(torch, TORCH[kind])(a, b))


@pytest.mark.parametrize("kind", ["copy", "relu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unary(kind, dtype, isa):
    for shape, _ in SHAPES:
        x = torch.randn(shape).to(dtype)
        assert same(ops.elementwise(kind, x), reference.elementwise(kind, x))
        for other in DTYPES:
            out = torch.empty(shape, dtype=other)
            assert ops.elementwise(kind, x, out=out) is out
            assert same(out, reference.elementwise(kind, x, out=torch.empty_like(out)))
    odd = torch.tensor([float("nan"), float("-inf"), -0.0, 0.0, float("inf")], dtype=dtype)
    assert same(ops.elementwise(kind, odd), reference.elementwise(kind, odd))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.uint8, torch.float64])
def test_any_dtype_is_copied_to_its_own(dtype, isa):
    x = torch.randint(0, 2, (3, 5, 7)).to(dtype)
    out = torch.zeros(7, 5, 3, dtype=dtype)
    ops.elementwise("copy", x.permute(2, 1, 0), out=out)
    assert torch.equal(out, x.permute(2, 1, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
@pytest.mark.parametrize("shape", [(1, 16), (70, 130), (64, 300), (129, 1), (3, 2, 65, 17)])
def test_a_transposed_copy(shape, dtype, isa, threads):
    base = torch.randint(0, 200, (*shape[:-1], shape[-1] + 3)).to(dtype)[..., :-3]
    wide = torch.zeros(*shape[:-2], shape[-1], shape[-2] + 5, dtype=dtype)
    for n in (1, 5):
        threads(n)
        out = wide.zero_()[..., :-5]
        ops.elementwise("copy", base.mT, out=out)
        assert torch.equal(out, base.mT) and not wide[..., -5:].any()
        assert torch.equal(ops.elementwise("copy", base.mT), base.mT)


@pytest.mark.parametrize("kind", [*BINARY[:3], "minimum", "maximum"])
def test_integers(kind, isa):
    a, b = torch.randint(-(2**62), 2**62, (5, 1)), torch.randint(-9, 9, (3,))
    assert torch.equal(ops.elementwise(kind, a, b), reference.elementwise(kind, a, b))  # overflow wraps as torch's


@pytest.mark.parametrize("kind", ["copy", *BINARY])
def test_layouts_and_in_place(kind, isa):
    base = torch.randn(6, 4, 50)
    for a, b in (
        base.chunk(2, -1),
        (base[:, 1], base[:, 2]),
        (base.transpose(0, 2), base[0, 0, :, None, None]),
        (base[:, :, ::2], base[:, :1, 1::2]),
        (base[..., :1], base[..., 1:2]),
    ):
        b = None if kind == "copy" else b
        expected = reference.elementwise(kind, a, b)
        out = torch.zeros(*a.shape, 3)[..., 1]
        assert same(ops.elementwise(kind, a, b, out=out), expected)
        mine = a.clone(memory_format=torch.preserve_format)
        assert same(ops.elementwise(kind, mine, b, out=mine), expected)


def test_out_shares_memory_with_nothing_but_its_own_elements(isa):
    x = torch.arange(48.0).view(4, 12)
    square = x.view(-1)[:16].view(4, 4)
    for a, out in ((x[:, 1:], x[:, :-1]), (x[1:], x[:-1]), (x[0], x), (square.T, square),
                   (x[:, :6], x[:, 3:9]), (x[:, :4], x.view(-1)[2:18].view(4, 4)),
                   (x, x.view(torch.bfloat16)[:, ::2])):  # fmt: skip
        before = x.clone()
        for kind, *given in (("copy", a), ("add", a, torch.ones(1)), ("add", torch.ones(1), a)):
            with pytest.raises(ValueError, match=r"^\[elementwise\] out must be [ab] itself or lie apart from it"):
                ops.elementwise(kind, *given, out=out)
        assert torch.equal(x, before)
    for out in (torch.zeros(1).expand(4), torch.zeros(3).expand(2, 3), torch.zeros(5).unfold(0, 3, 1)):
        with pytest.raises(ValueError, match=r"^\[elementwise\] out must have a place for each element"):
            ops.elementwise("copy", torch.ones(()), out=out)
    for a, out in ((x[:, :4], x[:, 4:8]), (x[:, ::2], x[:, 1::2]), (x[::2], x[1::2]), (x[:, :4].T, x[:, 8:].T),
                   (x[:2], x[2:]), (x[0], x[1]), (x[:, 3:4], x[:, :3]), (x[:, :0], x[:, :0])):  # fmt: skip
        expected = a.clone().expand(out.shape)
        assert torch.equal(ops.elementwise("copy", a, out=out), expected)


def test_any_number_of_threads_gives_the_same_bits(threads):
    a, b = torch.randn(37, 1001), torch.randn(37, 1)
    results = []
    for n in (1, 2, 5):
        threads(n)
        results.append(ops.elementwise("multiply", a, b))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_errors():
    x, i = torch.randn(2, 3), torch.arange(3)
    for kind, a, b, out, error, message in (
        ("power", x, x, None, ValueError, "kind must be 'copy'"),
        ("add", x, None, None, TypeError, "add needs b"),
        ("copy", x, x, None, TypeError, "copy takes no b"),
        ("add", x, torch.randn(4), None, ValueError, "must broadcast"),
        ("add", x, x, torch.empty(3), ValueError, r"a must broadcast to \(3,\), but got \(2, 3\)"),
        ("add", i, torch.randn(3), None, TypeError, "of int64 alone"),
        ("minimum", x, x, None, TypeError, "minimum must be of int64 alone"),
        ("divide", i, i, None, TypeError, "must be of float32"),
        ("copy", i, None, torch.empty(3), TypeError, "to the same dtype"),
    ):
        with pytest.raises(error, match=r"^\[elementwise\] .*" + message):
            ops.elementwise(kind, a, b, out=out)
    with pytest.raises(ValueError, match="has no gradients"):
        ops.elementwise("relu", x.requires_grad_())
