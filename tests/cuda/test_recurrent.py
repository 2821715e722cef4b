import pytest
import torch
from ops.test_recurrent import DTYPES, KINDS, flat, paired, parameters
from twins import check_twin

import pyllm
from pyllm import _C, ops, reference

# On the emulated device, whose 6 processors keep the weights of 48 hidden units, 8 each, or of 96, 16 each.
SIZES = {"resident": 20, "resident, wide": 70, "staged": 110}


def check(name, shape, hidden, dtype, device, *, states=True, bias=True, transposed=False, **options):
    layers, directions = options.get("num_layers", 1), 2 if options.get("bidirectional") else 1
    batch, time, inputs = shape
    x = torch.randn(batch, time, inputs)
    if transposed:
        x = torch.randn(inputs, batch, time + 2).permute(1, 2, 0)[:, 1 : time + 1]
    given = {"x": x.to(device, dtype)}
    given["params"] = [p.to(device, dtype) for p in parameters(name, inputs, hidden, layers, directions, bias)]
    if states:
        for state in ("h0", "c0") if name == "lstm" else ("h0",):
            given[state] = torch.randn(layers * directions, batch, hidden).to(device, dtype)
    check_twin(paired(getattr(ops, name)), paired(getattr(reference, name)), given, slack=32, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "options"), KINDS)
@pytest.mark.parametrize(
    ("shape", "hidden"), [((1, 1, 1), 1), ((2, 3, 5), 7), ((13, 4, 9), 33), ((1, 5, 3), 70), ((35, 2, 4), 104)]
)
def test_equals_its_twin(name, options, shape, hidden, dtype, device):
    check(name, shape, hidden, dtype, device, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "options"), KINDS)
def test_layers_directions_lengths_and_layouts(name, options, dtype, device):
    lengths = torch.tensor([3, 5, 0, 4, 1], device=device)
    check(name, (5, 5, 6), 9, dtype, device, num_layers=2, bidirectional=True, lengths=lengths, **options)
    check(name, (5, 5, 6), 16, dtype, device, lengths=lengths, states=False, bias=False, **options)
    check(name, (4, 3, 6), 8, dtype, device, num_layers=3, batch_first=True, transposed=True, bias=False, **options)
    check(name, (4, 3, 6), 8, dtype, device, bidirectional=True, batch_first=False, states=False, **options)
    check(name, (4, 3, 6), 8, dtype, device, num_layers=2, dropout=0.4, training=True, seed=5, **options)


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_long_sums(name, options, device):
    check(name, (2, 2, 3), 530, torch.float32, device, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["rnn", "gru", "lstm"])
def test_cells_equal_their_twins(name, dtype, device):
    def call(f):
        return lambda x, h, params, c=None: f(x, h if c is None else (h, c), *params)

    for batch, inputs, hidden, bias in ((1, 1, 1, True), (3, 5, 7, False), (2, 40, 32, True)):
        x, h, c = torch.randn(inputs, batch).T, torch.randn(batch, 2 * hidden)[:, ::2], torch.randn(batch, hidden + 1)
        given = {"x": x, "h": h} | ({"c": c[:, 1:]} if name == "lstm" else {})
        given = {k: v.to(device, dtype) for k, v in given.items()}
        given["params"] = [p.to(device, dtype) for p in parameters(name, inputs, hidden, bias=bias)]
        ours, theirs = (call(getattr(module, name + "_cell")) for module in (ops, reference))
        check_twin(ours, theirs, given, slack=32)
        with torch.no_grad():
            check_twin(ours, theirs, given, slack=32)


def one_hot(batch, time, inputs, device, dtype):
    """Inputs whose products with a weight are exact, in whatever order they are summed."""
    return torch.eye(inputs)[torch.randint(0, inputs, (batch, time))].to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "options"), KINDS)
@pytest.mark.parametrize("hidden", SIZES.values(), ids=SIZES.keys())
@torch.no_grad()
def test_same_bits_alone_in_any_batch_padding_pieces_and_cell_by_cell(name, options, hidden, dtype, device):
    f, cell, batch, time = getattr(ops, name), getattr(ops, name + "_cell"), 35, 4
    lengths = torch.randint(0, time + 1, (batch,))
    lengths[:3] = torch.tensor([time, 0, 1])
    x, p = one_hot(batch, time, 6, device, dtype), [t.to(device, dtype) for t in parameters(name, 6, hidden)]
    h = torch.randn(2, 1, batch, hidden).to(device, dtype)

    def state(rows):
        return (h[0][:, rows], h[1][:, rows]) if name == "lstm" else h[0][:, rows]

    padded = flat(f(x, p, state(slice(None)), lengths=lengths.to(device), **options))
    for b in (0, 1, 2, 34):
        length = int(lengths[b])
        y, *last = flat(f(x[b : b + 1, :length], p, state(slice(b, b + 1)), **options))
        assert torch.equal(y[0], padded[0][b, :length]) and (padded[0][b, length:] == 0).all()
        assert all(torch.equal(s[:, 0], r[:, b]) for s, r in zip(last, padded[1:], strict=True))

    whole, pieces, carried = flat(f(x[:2], p, **options)), [], None
    for piece in x[:2].split([1, 3], 1):
        y, carried = f(piece, p, carried, **options)
        pieces.append(y)
    assert torch.equal(torch.cat(pieces, 1), whole[0])
    assert all(torch.equal(a, b) for a, b in zip(flat(carried), whole[1:], strict=True))
    carried = [x.new_zeros(2, hidden)] * (2 if name == "lstm" else 1)
    for t in range(time):
        carried = flat(cell(x[:2, t], carried if name == "lstm" else carried[0], *p, **options))
        assert torch.equal(carried[0], whole[0][:, t])


@pytest.mark.parametrize("name", ["rnn", "gru", "lstm"])
def test_weights_stay_for_all_steps_where_they_fit(name, device):
    if device.type == "cuda":
        pytest.skip("counts launches of the emulator")
    for kind, hidden in SIZES.items():
        for time in (1, 5):
            x, p = torch.randn(2, time, 3), [t.requires_grad_() for t in parameters(name, 3, hidden)]
            h0 = torch.randn(1, 2, hidden, requires_grad=True)
            before = _C._emulated_launches()
            y, _ = getattr(ops, name)(x, p, (h0, h0) if name == "lstm" else h0)
            forward = _C._emulated_launches() - before
            assert forward == (hidden % 4 > 0) + 1 + (1 if "resident" in kind else time), (kind, time)
            before = _C._emulated_launches()
            y.sum().backward()  # a last step makes the gradient of h0
            assert _C._emulated_launches() - before == 2 + (1 if "resident" in kind else time + 1), (kind, time)


def test_padding_may_hold_anything(device):
    x, p = torch.randn(3, 4, 5).to(device), [t.to(device).requires_grad_() for t in parameters("lstm", 5, 6, 2)]
    lengths = torch.tensor([2, 4, 0], device=device)
    clean = torch.autograd.grad(ops.lstm(x, p, num_layers=2, lengths=lengths)[0].sum(), p)
    x[0, 2:], x[2] = torch.nan, torch.inf
    dirty = torch.autograd.grad(ops.lstm(x, p, num_layers=2, lengths=lengths)[0].sum(), p)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


def test_nan_and_infinity_are_not_hidden(device):
    for name, options in KINDS:
        p = [t.to(device) for t in parameters(name, 4, 5)]
        x = torch.randn(2, 3, 4).to(device)
        x[1, 1, 2] = torch.nan
        y, _ = getattr(ops, name)(x, p, **options)
        assert y[1, 1:].isnan().all() and y[0].isfinite().all() and y[1, 0].isfinite().all()


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_empty(name, options, device):
    check(name, (0, 3, 4), 5, torch.float32, device, **options)
    check(name, (2, 3, 0), 5, torch.float32, device, **options)
    p, h = [t.to(device) for t in parameters(name, 4, 5)], torch.randn(1, 2, 5).to(device)
    y, *last = flat(getattr(ops, name)(h.new_ones(2, 0, 4), p, (h, h) if name == "lstm" else h, **options))
    assert y.shape == (2, 0, 5) and all(torch.equal(t, h) for t in last)


def test_a_wrong_length_is_raised_later(device):
    x, p = torch.randn(2, 3, 4).to(device), [t.to(device).requires_grad_() for t in parameters("gru", 4, 5)]
    for wrong in (-1, 4):
        y, _ = ops.gru(x, p, lengths=torch.tensor([3, wrong], device=device))
        with pytest.raises(ValueError, match=rf"lengths must be in \[0, 3\], but got {wrong} at element 1"):
            pyllm.synchronize()
    assert y[1].isfinite().all()


def test_errors_name_the_argument(device):
    x, p = torch.randn(2, 3, 4).to(device), [t.to(device) for t in parameters("gru", 4, 5)]
    with pytest.raises(ValueError, match=r"\[gru\] w_ih must have shape \(15, 4\), but got \(15, 3\)"):
        ops.gru(x, [p[0][:, 1:], *p[1:]])
    with pytest.raises(ValueError, match=r"\[gru\] w_hh must have shape \(15, 5\), but got \(14, 5\)"):
        ops.gru(x, [p[0], p[1][1:], *p[2:]])
    with pytest.raises(TypeError, match=r"\[gru\] w_hh must be float32, but got bfloat16"):
        ops.gru(x, [p[0], p[1].bfloat16(), *p[2:]])
    with pytest.raises(TypeError, match=r"\[gru\] w_ih must be torch.float32 on .*, but got torch.bfloat16"):
        ops.gru(x, [p[0].bfloat16(), *p[1:]])
    with pytest.raises(TypeError, match=r"\[gru\] x must be float32, bfloat16 or float16, but got torch.int64"):
        ops.gru(x.long(), p)
    with pytest.raises(ValueError, match=r"\[gru\] b_hh must have shape \(15,\), but got \(5,\)"):
        ops.gru(x, [*p[:3], p[3][:5]])
    with pytest.raises(ValueError, match=r"\[gru\] h0 must have shape \(2, 5\), but got \(3, 5\)"):
        ops.gru(x, p, x.new_zeros(1, 3, 5))
    with pytest.raises(ValueError, match=r"\[gru\] lengths must have shape \(2,\), but got \(3,\)"):
        ops.gru(x, p, lengths=torch.tensor([3, 1, 1], device=device))
    with pytest.raises(TypeError, match=r"\[gru\] lengths must be int64, but got int32"):
        ops.gru(x, p, lengths=torch.tensor([3, 1], device=device).int())


def test_steps_are_for_cuda_alone():
    sums, (_, w_hh, *_) = torch.zeros(6, 15), parameters("gru", 4, 5)
    y, h_n = torch.zeros(3, 2, 5), torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"\[gru\] the products of the inputs must be on a CUDA device"):
        _C.recurrent_steps("gru", 2, False, sums, w_hh, *[None] * 5, y, h_n, None, False, *[None] * 3)
