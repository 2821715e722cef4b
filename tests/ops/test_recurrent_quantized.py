"""Recurrent layers whose weights are quantised."""

import itertools

import pytest
import torch
from ops.test_recurrent import DTYPES, KINDS, flat, parameters
from twins import check_twin

from pyllm import ops, reference
from pyllm.ops import QuantizedWeight
from pyllm.quantization import quantize_weight

FORMATS = [(8, False), (4, False), (4, True)]
WHICH = [(True, True), (True, False), (False, True)]  # of w_ih and w_hh


def quantised(params, bits, minimums, which=(True, True)):
    """Parameters with weights that are quantised, and with the same dequantised."""
    ours = [quantize_weight(p, bits, minimums=minimums) if p.dim() == 2 and wanted else p
            for p, wanted in zip(params, itertools.cycle((*which, False, False)))]  # fmt: skip
    packed = [ops.pack_quantized(p) if isinstance(p, QuantizedWeight) else p for p in ours]
    return ours, packed, [p.dequantize() if isinstance(p, QuantizedWeight) else p for p in ours]


def run(name, x, params, state, options):
    h, c = state
    return getattr(ops, name)(x, params, (h, c) if name == "lstm" else h, **options)


def step(cell, params, options):
    """A cell whose parameters are those, but for its tensors."""

    def call(x, h, tensors, c=None):
        given = iter(tensors)
        params_now = [next(given) if isinstance(p, torch.Tensor) else p for p in params]
        return cell(x, h if c is None else (h, c), *params_now, **options)

    return call


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "minimums", "which"), [(*f, w) for f, w in zip(FORMATS, WHICH, strict=True)])
@pytest.mark.parametrize(("name", "options"), KINDS)
def test_a_step_equals_its_twin(name, options, bits, minimums, which, dtype, isa):
    """The twin rounds a state as the operation does where it is the same: that of one step."""
    for batch, inputs, hidden, bias in ((1, 1, 1, True), (3, 5, 7, False), (14, 40, 33, True)):
        ours, packed, _ = quantised(parameters(name, inputs, hidden, bias=bias), bits, minimums, which)
        x, h, c = torch.randn(inputs, batch).T, torch.randn(batch, 2 * hidden)[:, ::2], torch.randn(batch, hidden + 1)
        given = {"x": x, "h": h} | ({"c": c[:, 1:]} if name == "lstm" else {})
        given = {k: v.to(dtype) for k, v in given.items()}
        given["tensors"] = [p.to(dtype) for p in ours if isinstance(p, torch.Tensor)]

        cells = (step(getattr(f, f"{name}_cell"), w, options) for f, w in ((ops, packed), (reference, ours)))
        check_twin(*cells, given, slack=64)


@pytest.mark.parametrize(("dtype", "bits", "minimums"), [(d, *f) for d, f in zip(DTYPES, FORMATS, strict=True)])
@pytest.mark.parametrize(("name", "options"), KINDS)
def test_same_bits_alone_in_any_batch_padding_pieces_and_threads(name, options, bits, minimums, dtype, isa, threads):
    batch, time, inputs, hidden = 19, 7, 20, 45
    lengths = torch.randint(0, time + 1, (batch,))
    lengths[:3] = torch.tensor([time, 0, 1])
    x, state = torch.randn(batch, time, inputs).to(dtype), torch.randn(2, 4, batch, hidden).to(dtype)
    for which in WHICH:
        params = quantised(parameters(name, inputs, hidden, 2, 2), bits, minimums, which)[1]
        params = [p.to(dtype) if isinstance(p, torch.Tensor) else p for p in params]
        layers = options | {"num_layers": 2, "bidirectional": True}
        results = []
        for n in (1, 5):
            threads(n)
            results.append(flat(run(name, x, params, state, layers | {"lengths": lengths})))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        for b in (0, 1, 2, 18):
            length, row = int(lengths[b]), slice(b, b + 1)
            y, *last = flat(run(name, x[row, :length], params, state[:, :, row], layers))
            assert torch.equal(y[0], results[0][0][b, :length])
            assert (results[0][0][b, length:] == 0).all()
            assert all(torch.equal(s[:, 0], r[:, b]) for s, r in zip(last, results[0][1:], strict=True))

        params, state1 = params[:4], state[:, :1]  # one direction of one layer, the state carried
        y, *last = flat(run(name, x, params, state1, options))
        carried, pieces = tuple(state1), []
        for piece in x.split([1, 2, 4], 1):
            out, carried = run(name, piece, params, carried if name == "lstm" else (carried[0], None), options)
            carried = carried if name == "lstm" else (carried, None)
            pieces.append(out)
        assert torch.equal(torch.cat(pieces, 1), y)
        cell = getattr(ops, f"{name}_cell")
        h, c = state1[0, 0], state1[1, 0]
        for t in range(time):
            out = cell(x[:, t], (h, c) if name == "lstm" else h, *params, **options)
            h, c = out if name == "lstm" else (out, c)
            assert torch.equal(h, y[:, t])
        assert torch.equal(h, last[0][0])


@pytest.mark.parametrize(("bits", "minimums"), FORMATS)
@pytest.mark.parametrize(("name", "options"), KINDS)
def test_a_sequence_is_near_that_of_the_dequantised_weights(name, options, bits, minimums, kernels):
    """What rounding inputs and states to 8 bits costs, in all steps together."""
    inputs, hidden = 96, 64
    _, packed, dense = quantised(parameters(name, inputs, hidden, 2, 2), bits, minimums)
    x = torch.randn(5, 20, inputs)
    options = options | {"num_layers": 2, "bidirectional": True}
    y, _ = getattr(ops, name)(x, packed, **options)
    exact, _ = getattr(reference, name)(x.double(), [p.double() for p in dense], **options)
    assert (y - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_gradients_go_through_the_dequantised_weights(name, options, isa, threads):
    _, packed, dense = quantised(parameters(name, 40, 30, 2), 4, True)
    x, state = torch.randn(4, 11, 40), torch.randn(2, 2, 4, 30)
    results = []
    for params, n in ((packed, 1), (packed, 5), (dense, 2)):
        threads(n)
        leaves = [t.clone().requires_grad_() for t in (x, state[0], state[1])]
        biases = [p.clone().requires_grad_() for p in params if isinstance(p, torch.Tensor) and p.dim() == 1]
        rest = iter(biases)
        given = [next(rest) if isinstance(p, torch.Tensor) and p.dim() == 1 else p for p in params]
        y, _ = run(name, leaves[0], given, leaves[1:], options | {"num_layers": 2})
        results.append(torch.autograd.grad(y.sin().sum(), [*leaves[: 3 if name == "lstm" else 2], *biases]))
    for ours, again, near in zip(*results, strict=True):
        assert torch.equal(ours, again)
        assert ours.abs().sum() > 0 and (ours - near).norm() < 0.1 * near.norm()


def test_nothing_to_do():
    for name, options in KINDS:
        params = quantised(parameters(name, 4, 5), 8, False)[1]
        assert getattr(ops, name)(torch.ones(0, 3, 4), params, **options)[0].shape == (0, 3, 5)
        h = torch.randn(2, 1, 2, 5)
        y, *last = flat(run(name, torch.ones(2, 0, 4), params, h, options))
        assert y.shape == (2, 0, 5) and all(torch.equal(a, b) for a, b in zip(last, h, strict=False))
        assert getattr(ops, name)(torch.ones(2, 3, 0), [*quantised(parameters(name, 0, 5), 8, False)[1]],
                                  **options)[0].shape == (2, 3, 5)  # fmt: skip


def test_not_a_number_is_not_hidden():
    for name, options in KINDS:
        params, x = quantised(parameters(name, 4, 5), 8, False)[1], torch.randn(2, 3, 4)
        x[1, 1, 2] = torch.nan
        y, _ = getattr(ops, name)(x, params, **options)
        assert y[1, 1:].isnan().all() and y[0].isfinite().all() and y[1, 0].isfinite().all()


def test_errors_name_the_argument():
    params, x = parameters("gru", 4, 5), torch.randn(2, 3, 4)

    def pack(weight):
        return ops.pack_quantized(quantize_weight(weight, 8))

    with pytest.raises(ValueError, match=r"\[gru\] w_ih must have shape \(15, 4\), but got \(15, 3\)"):
        ops.gru(x, [pack(params[0][:, 1:]), *params[1:]])
    with pytest.raises(ValueError, match=r"\[gru\] w_hh must have shape \(15, 5\), but got \(14, 5\)"):
        ops.gru(x, [params[0], pack(params[1][1:]), *params[2:]])
    other = pack(params[1])
    other = ops.PackedQuantizedWeight(other._panels_of(2 * other.width), *other.layout, other.shape)
    with pytest.raises(ValueError, match=r"\[gru\] w_hh must be packed for .*: pack it again"):
        ops.gru(x, [params[0], other, *params[2:]])
    with pytest.raises(TypeError, match=r"\[gru\] params\[0\] must be a torch.Tensor, but got QuantizedWeight"):
        ops.gru(x, [quantize_weight(params[0], 8), *params[1:]])


def test_compiled_models_run_them_outside_of_the_graph():
    params, x = quantised(parameters("lstm", 4, 5), 8, False)[1], torch.randn(2, 3, 4)
    torch.compiler.reset()
    step = torch.compile(lambda x: ops.lstm(x * 2, params)[0] + 1, backend="eager")
    assert torch.equal(step(x), ops.lstm(x * 2, params)[0] + 1)
