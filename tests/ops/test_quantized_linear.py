import pickle

import pytest
import torch
from twins import check_twin

from pyllm import _C, ops, reference
from pyllm.ops import QuantizedWeight
from pyllm.ops.quantized_linear import pack_pieces

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LARGER = [64, 128, 256]
SCALES = [torch.float16, torch.float32]


def random_weight(n, k, bits, minimums, dtype=torch.float16, group=32):
    piece = min(group, 32)
    groups = -(-k // piece)

    def of_each(t):  # what a group's pieces share
        return t.repeat_interleave(group // piece, 1)[:, :groups].contiguous()

    if bits == 4 and group > 32:
        unit, most = of_each(2.0 ** torch.randint(-12, -3, (n, -(-k // group)))), 16 if minimums else 15
        multiples = torch.randint(-most, most + 1, (n, groups))
        least = -127 - (15 * multiples).clamp(max=0)
        low = least + (torch.rand(n, groups) * (127 - (15 * multiples).clamp(min=0) - least + 1)).long()
        scales, lows = (multiples * unit).to(dtype), (low * unit).to(dtype)
    else:
        scales, lows = of_each(torch.rand(n, -(-k // group)).to(dtype) + 0.1), torch.randn(n, groups).to(dtype)
    return QuantizedWeight(torch.randint(0, 256, (n, groups * piece * bits // 8), dtype=torch.uint8), scales,
                           lows if minimums else None, bits, (n, k), group)  # fmt: skip


FORMATS = [(bits, minimums) for bits in (8, 4) for minimums in (False, True)]
IN_LARGER = [(bits, minimums, g) for bits, minimums in FORMATS if bits == 4 or not minimums for g in LARGER]


@pytest.mark.parametrize(("bits", "minimums"), FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "n"), [((1, 1), 1), ((2, 0), 5), ((7, 33), 65), ((2, 5, 96), 31), ((0, 40), 3), ((3, 1023), 17)]
)
def test_equals_its_twin(shape, n, dtype, bits, minimums, kernels):
    weight = random_weight(n, shape[-1], bits, minimums)
    packed = ops.pack_quantized(weight)
    check_twin(
        lambda x, bias: ops.quantized_linear(x, packed, bias),
        lambda x, bias: reference.quantized_linear(x, weight, bias),
        {"x": torch.randn(shape).to(dtype), "bias": torch.randn(n).to(dtype)},
        slack=32,
    )


@pytest.mark.parametrize(("bits", "minimums"), FORMATS)
def test_strided_rows(bits, minimums, kernels):
    weight = random_weight(20, 40, bits, minimums)
    packed, base = ops.pack_quantized(weight), torch.randn(6, 4, 80)
    for x in (base[:, 1, 3:43], base.transpose(0, 1)[..., ::2], base[0, :, :40].T.contiguous().T):
        check_twin(lambda x: ops.quantized_linear(x, packed),
                   lambda x: reference.quantized_linear(x, weight), {"x": x}, slack=32)  # fmt: skip


@pytest.mark.parametrize(("bits", "minimums"), FORMATS)
def test_the_extremes_are_exact(bits, minimums, kernels):
    """Whole numbers of the largest size, whose products must neither saturate nor wrap: powers of two lose nothing."""
    weight = random_weight(33, 512, bits, minimums)
    values = torch.where(torch.rand(33, 512 * bits // 8) < 0.5, 0, 255).to(torch.uint8)
    scales, minimum = torch.full((33, 16), 0.5, dtype=torch.float16), torch.full((33, 16), 2.0, dtype=torch.float16)
    weight = QuantizedWeight(values, scales, minimum if minimums else None, bits, (33, 512))
    x = torch.where(torch.rand(5, 512) < 0.5, -127.0, 127.0)
    exact = x.double() @ weight.dequantize().double().T
    assert torch.equal(ops.quantized_linear(x, ops.pack_quantized(weight)).double(), exact)
    x[:] = 127
    exact = x.double() @ weight.dequantize().double().T
    assert torch.equal(ops.quantized_linear(x, ops.pack_quantized(weight)).double(), exact)


@pytest.mark.parametrize("group", LARGER)
@pytest.mark.parametrize(("multiple", "minimum"), [(15, None), (-15, None), (16, -127), (-16, 127), (0, 127)])
def test_the_extremes_of_units_are_exact(multiple, minimum, group, kernels):
    """The largest whole numbers of units, and their sums: also of units far from 1, and scales of x near both ends."""
    values = torch.where(torch.rand(33, 256) < 0.5, 0, 255).to(torch.uint8)
    values[:3] = torch.tensor([0, 255, 15], dtype=torch.uint8)[:, None]
    for unit, largest in ((0.5, 127.0), (2.0**-24, 1e-29), (256.0, 2.0**100)):
        scales, lows = (torch.full((33, 16), m * unit) for m in (multiple, minimum or 0))
        scales[:, ::4] = 0.0 if minimum is not None else 64 * unit / 8
        weight = QuantizedWeight(values, scales, None if minimum is None else lows, 4, (33, 512), group)
        x = torch.where(torch.rand(40, 512) < 0.5, -largest, largest)
        x[:2] = largest
        y, exact = ops.quantized_linear(x, ops.pack_quantized(weight)), x.double() @ weight.dequantize().double().T
        assert torch.allclose(y.double(), exact, rtol=1e-5, atol=largest * unit * 0.01)
        assert torch.equal(ops.quantized_linear(x[1:2], ops.pack_quantized(weight)), y[1:2])
        if largest == 127.0:
            assert torch.equal(y.double(), exact)


@pytest.mark.parametrize("dtype", SCALES)
@pytest.mark.parametrize("minimums", [False, True])
def test_scales_that_are_no_whole_multiples_of_a_unit_are_refused(minimums, dtype, isa):
    right = random_weight(40, 300, 4, minimums, dtype, 128)
    what = "scales and minimums" if minimums else "scales"
    wrongs = [(4.0 + 1 / 128, 1.0), (torch.nan, 0.0), (torch.inf, 0.0), (2.0**-24, 1.0)]
    for name in ("scales", "minimums")[: 1 + minimums]:
        for value, other in wrongs:
            spoilt = {key: t.clone() for key in ("scales", "minimums") if (t := getattr(right, key)) is not None}
            spoilt["scales"][35, 4:8], spoilt[name][35, 5] = other, value
            wrong = QuantizedWeight(**(vars(right) | spoilt))
            with pytest.raises(
                ValueError, match=rf"\[pack_quantized\] {what} of 4 bits in groups of 128 must be whole"
            ):
                ops.pack_quantized(wrong)
            packed = ops.pack_quantized(QuantizedWeight(**(vars(wrong) | {"group": 32})))
            with pytest.raises(ValueError, match="must be whole multiples"):
                ops.PackedQuantizedWeight.of_panels(
                    packed.panels, (4, 128, dtype == torch.float16, minimums), (40, 300)
                )
    packed = ops.pack_quantized(right)
    for width in (8, 16, 32):
        again = ops.PackedQuantizedWeight.of_panels(packed._panels_of(width), packed.layout, right.shape)
        assert torch.equal(again.panels, packed.panels)


@pytest.mark.parametrize(("bits", "minimums", "group"), [(*f, 32) for f in FORMATS] + IN_LARGER[1::3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_alone_in_a_batch_and_for_any_threads(dtype, bits, minimums, group, kernels, threads):
    packed = ops.pack_quantized(random_weight(170, 600, bits, minimums, group=group))
    x, bias = torch.randn(150, 600).to(dtype), torch.randn(170).to(dtype)
    threads(1)
    expected = ops.quantized_linear(x, packed, bias)
    for n in (2, 5):
        threads(n)
        assert torch.equal(ops.quantized_linear(x, packed, bias), expected)
    for rows in (slice(7, 8), slice(60, 62), slice(3, 20)):
        assert torch.equal(ops.quantized_linear(x[rows], packed, bias), expected[rows])


@pytest.mark.parametrize(("bits", "minimums", "group"), [(*f, 32) for f in FORMATS] + IN_LARGER)
@pytest.mark.parametrize(("rows", "k"), [(45, 300), (45, 416), (45, 5), (190, 2500)])
def test_with_and_without_tiles_and_a_dot_product_of_bytes_the_bits_are_the_same(bits, minimums, group, rows, k, isa):
    packed, x = ops.pack_quantized(random_weight(50, k, bits, minimums, group=group)), torch.randn(rows, k)
    alone = ops.quantized_linear(x[-1:], packed)
    results = []
    for amx, vnni in ((True, True), (False, True), (False, False)):
        _C.set_amx(amx)
        _C.set_vnni(vnni)
        results.append(ops.quantized_linear(x, packed))
    _C.set_amx(True)
    _C.set_vnni(True)
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])
    assert torch.equal(results[0][-1:], alone)


@pytest.mark.parametrize("dtype", SCALES)
@pytest.mark.parametrize(("bits", "minimums"), FORMATS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 33), (33, 64), (70, 300), (0, 4), (3, 0)])
def test_packing_loses_nothing(n, k, bits, minimums, dtype, isa):
    weight = random_weight(n, k, bits, minimums, dtype)
    again = ops.pack_quantized(weight).unpack()
    assert (again.bits, again.shape) == (bits, (n, k)) and torch.equal(again.values, weight.values)
    assert torch.equal(again.scales, weight.scales)
    assert again.minimums is None if weight.minimums is None else torch.equal(again.minimums, weight.minimums)
    assert torch.equal(again.dequantize(), weight.dequantize())


@pytest.mark.parametrize(("bits", "minimums", "group"), [(8, False, 16), (8, True, 16), *IN_LARGER])
@pytest.mark.parametrize(("shape", "n"), [((7, 33), 65), ((1, 1), 1), ((39, 256), 20), ((13, 1023), 37)])
def test_other_groups(shape, n, bits, minimums, group, kernels):
    weight = random_weight(n, shape[-1], bits, minimums, torch.float32, group=group)
    packed, x = ops.pack_quantized(weight), torch.randn(shape)
    check_twin(lambda x: ops.quantized_linear(x, packed), lambda x: reference.quantized_linear(x, weight), {"x": x},
               slack=32)  # fmt: skip
    assert torch.equal(ops.quantized_linear(x[:1], packed), ops.quantized_linear(x, packed)[:1])
    again = packed.unpack()
    assert torch.equal(again.values, weight.values) and torch.equal(again.dequantize(), weight.dequantize())


@pytest.mark.parametrize(
    ("bits", "minimums", "group"),
    [(*f, 32) for f in FORMATS] + [(8, m, 16) for m in (False, True)] + IN_LARGER,
)
def test_a_product_is_within_its_own_rounding_of_the_exact_one(bits, minimums, group, kernels):
    """x is rounded to 8 bits in groups by its largest element: that, and the sums in float32, is all that is lost."""
    weight = random_weight(60, 330, bits, minimums, group=group)
    x, dense = torch.randn(6, 330), weight.dequantize().double()
    exact = x.double() @ dense.T
    padded = (torch.nn.functional.pad(t, (0, -330 % group)).unflatten(1, (-1, group)) for t in (x.double(), dense))
    grouped, w = padded
    half_step = grouped.abs().amax(-1) / 127 / 2
    bound = half_step @ w.abs().sum(-1).T + 1e-5 * (x.double().abs() @ dense.abs().T)
    assert ((ops.quantized_linear(x, ops.pack_quantized(weight)).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "minimums", "group"), [(*f, 32) for f in FORMATS] + [(8, True, 16)] + IN_LARGER[1::3])
def test_the_gradient_has_the_same_bits_alone_and_for_any_threads(bits, minimums, group, dtype, isa, threads):
    packed = ops.pack_quantized(random_weight(301, 90, bits, minimums, group=group))
    x, dy = torch.randn(23, 90).to(dtype).requires_grad_(), torch.randn(23, 301).to(dtype)
    threads(1)
    (expected,) = torch.autograd.grad(ops.quantized_linear(x, packed), x, dy)
    threads(5)
    for rows in (slice(0, 23), slice(3, 4), slice(5, 17)):
        (found,) = torch.autograd.grad(ops.quantized_linear(x, packed), x, dy)
        assert torch.equal(found, expected)
        part = x[rows].detach().requires_grad_()
        assert torch.equal(torch.autograd.grad(ops.quantized_linear(part, packed), part, dy[rows])[0], expected[rows])


@pytest.mark.parametrize("sizes", [(5, 40, 1, 30), (16, 60), (76,)])
def test_a_weight_can_come_in_pieces(sizes, isa):
    weight = random_weight(76, 64, 4, True)
    pieces = [
        QuantizedWeight(v.contiguous(), s, m, 4, (len(v), 64))
        for v, s, m in zip(*(t.split(sizes) for t in (weight.values, weight.scales, weight.minimums)), strict=True)
    ]
    assert torch.equal(pack_pieces(iter(pieces), 76).panels, ops.pack_quantized(weight).panels)
    with pytest.raises(ValueError, match="pieces must have 77 rows together, but got"):
        pack_pieces(pieces, 77)
    with pytest.raises(ValueError, match="all rows must be of one format"):
        pack_pieces([pieces[0], random_weight(3, 64, 8, False)], 76)


@pytest.mark.parametrize("dtype", SCALES)
@pytest.mark.parametrize(("bits", "minimums", "group"), [(*f, 32) for f in FORMATS] + [(8, True, 16), (4, True, 64)])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (45, 70), (0, 4)])
def test_panels_of_another_width_hold_the_same(n, k, bits, minimums, group, dtype, isa):
    weight = random_weight(n, k, bits, minimums, dtype, group)
    packed = ops.pack_quantized(weight)
    for width in (8, 16, 32):
        other = ops.PackedQuantizedWeight(packed._panels_of(width), *packed.layout, packed.shape)
        assert other.width == width and torch.equal(other.unpack().dequantize(), weight.dequantize())
        assert torch.equal(other.to("cpu").panels, packed.panels)


def test_layers_that_share_a_weight_share_it_elsewhere_too():
    packed = ops.pack_quantized(random_weight(45, 70, 8, False))
    assert packed.to("cpu") is packed
    moved = packed.to("meta")
    assert packed.to("meta") is moved and moved.panels.is_meta
    assert pickle.loads(pickle.dumps(packed)).to("meta") is not moved


def test_dequantize_is_what_is_written():
    low_first = QuantizedWeight(torch.full((1, 16), 0x2F, dtype=torch.uint8), torch.full((1, 1), 0.5), None, 4, (1, 3))
    assert low_first.dequantize().tolist() == [[3.5, -3.0, 3.5]]
    bytes_ = QuantizedWeight(
        torch.full((1, 32), 130, dtype=torch.uint8), torch.full((1, 1), 0.5), torch.ones(1, 1), 8, (1, 2)
    )
    assert bytes_.dequantize().tolist() == [[66.0, 66.0]]


def test_a_row_that_is_not_finite_gives_nan_and_disturbs_no_other():
    packed, x = ops.pack_quantized(random_weight(40, 64, 8, False)), torch.randn(6, 64)
    expected = ops.quantized_linear(x, packed)
    x[2, 40], x[4, 0], x[5] = float("inf"), float("nan"), 0.0
    y = ops.quantized_linear(x, packed)
    assert y[[2, 4]].isnan().all() and torch.equal(y[[0, 1, 3]], expected[[0, 1, 3]])
    assert torch.equal(y[5], torch.zeros(40))


def test_errors_name_the_argument():
    weight = random_weight(5, 40, 8, True)
    packed, x = ops.pack_quantized(weight), torch.randn(2, 40)
    with pytest.raises(ValueError, match=r"share K, but got \(2, 39\) and \(5, 40\)"):
        ops.quantized_linear(x[:, :39], packed)
    with pytest.raises(TypeError, match=r"x must be float32, bfloat16 or float16, but got float64"):
        ops.quantized_linear(x.double(), packed)
    with pytest.raises(TypeError, match=r"bias must be float32, but got bfloat16"):
        ops.quantized_linear(x, packed, torch.zeros(5).bfloat16())
    with pytest.raises(ValueError, match=r"bias must have shape \(5,\), but got \(6,\)"):
        ops.quantized_linear(x, packed, torch.zeros(6))

    def spoilt(**changes):
        return ops.pack_quantized(QuantizedWeight(**(vars(weight) | changes)))

    with pytest.raises(ValueError, match=r"values must have shape \(5, 64\), but got \(5, 63\)"):
        spoilt(values=weight.values[:, 1:])
    with pytest.raises(TypeError, match=r"values must be uint8, but got int64"):
        spoilt(values=weight.values.long())
    with pytest.raises(TypeError, match=r"scales must be float16 or float32, but got bfloat16"):
        spoilt(scales=weight.scales.bfloat16())
    with pytest.raises(TypeError, match=r"minimums must be float16, but got float32"):
        spoilt(minimums=weight.minimums.float())
    with pytest.raises(ValueError, match=r"minimums must have shape \(5, 2\), but got \(4, 2\)"):
        spoilt(minimums=weight.minimums[1:])
    with pytest.raises(ValueError, match=r"scales must have shape \(5, 2\), but got \(5, 1\)"):
        spoilt(scales=weight.scales[:, :1])
    with pytest.raises(ValueError, match=r"bits must be 8 or 4, but got 5"):
        spoilt(bits=5)
    with pytest.raises(
        ValueError,
        match=r"groups must be of 32 elements, of 16 of 8 bits or, but not of 8 bits with .*, 128 or 256, but got 8",
    ):
        spoilt(group=8, scales=torch.ones(5, 5), minimums=None)


def test_a_weight_packed_for_another_instruction_set_is_refused():
    isas = _C.info()["isas"]
    if len(isas) < 2:
        pytest.skip("this machine has one instruction set")
    chosen = _C.info()["isa"]
    try:
        _C.set_isa(isas[0])
        packed = ops.pack_quantized(random_weight(5, 40, 8, False))
        _C.set_isa(isas[-1])
        with pytest.raises(ValueError, match="pack it again"):
            ops.quantized_linear(torch.randn(2, 40), packed)
    finally:
        _C.set_isa(chosen)
