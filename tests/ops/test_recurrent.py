import pytest
import torch
from twins import check_twin

from pyllm import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GATES = {"rnn": 1, "gru": 3, "lstm": 4}
KINDS = [("rnn", {}), ("rnn", {"nonlinearity": "relu"}), ("gru", {}), ("lstm", {})]


def parameters(name, inputs, hidden, num_layers=1, directions=1, bias=True):
    params = []
    for layer in range(num_layers):
        for _ in range(directions):
            width = GATES[name] * hidden
            params += [torch.randn(width, directions * hidden if layer else inputs), torch.randn(width, hidden)]
            params += [torch.randn(width), torch.randn(width)] if bias else []
    return [p / max(hidden, 1) ** 0.5 for p in params]


def to(dtype, *tensors):
    return [t.to(dtype) for t in tensors]


def flat(out):
    return [out] if isinstance(out, torch.Tensor) else [t for part in out for t in flat(part)]


def paired(f):
    """lstm's twin test takes its states as two tensors, so that each gets a gradient."""

    def call(x, params, h0=None, c0=None, **options):
        state = (h0,) if h0 is None or c0 is None else ((h0, c0),)
        return f(x, params, *state, **options)

    return call


def check(name, shape, hidden, dtype, *, states=True, bias=True, transposed=False, **options):
    layers, directions = options.get("num_layers", 1), 2 if options.get("bidirectional") else 1
    batch, time, inputs = shape
    x = torch.randn(batch, time, inputs)
    if transposed:
        x = torch.randn(inputs, batch, time + 2).permute(1, 2, 0)[:, 1 : time + 1]
    inputs = {"x": x.to(dtype), "params": to(dtype, *parameters(name, inputs, hidden, layers, directions, bias))}
    if states:
        inputs["h0"] = torch.randn(layers * directions, batch, hidden).to(dtype)
        if name == "lstm":
            inputs["c0"] = torch.randn(layers * directions, batch, hidden).to(dtype)
    check_twin(paired(getattr(ops, name)), paired(getattr(reference, name)), inputs, slack=32, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "options"), KINDS)
@pytest.mark.parametrize(
    ("shape", "hidden"), [((1, 1, 1), 1), ((2, 3, 5), 7), ((13, 4, 9), 33), ((1, 6, 3), 70), ((3, 1, 8), 16)]
)
def test_equals_its_twin(name, options, shape, hidden, dtype, isa):
    check(name, shape, hidden, dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "options"), KINDS)
def test_layers_directions_lengths_and_layouts(name, options, dtype, isa):
    lengths = torch.tensor([3, 5, 0, 4, 1])
    check(name, (5, 5, 6), 9, dtype, num_layers=2, bidirectional=True, lengths=lengths, **options)
    check(name, (5, 5, 6), 9, dtype, lengths=lengths, states=False, bias=False, **options)
    check(name, (4, 3, 6), 8, dtype, num_layers=3, batch_first=True, transposed=True, bias=False, **options)
    check(name, (4, 3, 6), 8, dtype, bidirectional=True, batch_first=False, states=False, **options)
    check(name, (4, 3, 6), 8, dtype, num_layers=2, dropout=0.4, training=True, seed=5, **options)


@pytest.mark.parametrize(("name", "options"), KINDS)
@pytest.mark.parametrize(
    ("shape", "hidden"), [((3, 7, 300), 270), ((5, 30, 80), 70), ((20, 40, 10), 20), ((600, 3, 5), 6)]
)
def test_long_sums_chunks_and_large_batches(name, options, shape, hidden, kernels):
    check(name, shape, hidden, torch.float32, num_layers=2, **options)


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_empty(name, options):
    check(name, (0, 3, 4), 5, torch.float32, **options)
    check(name, (2, 3, 0), 5, torch.float32, **options)
    p, h = parameters(name, 4, 5), torch.randn(1, 2, 5)
    y, *last = flat(getattr(ops, name)(torch.ones(2, 0, 4), p, (h, h) if name == "lstm" else h, **options))
    assert y.shape == (2, 0, 5) and all(torch.equal(t, h) for t in last)


@pytest.mark.parametrize("batch", [1, 40])
@pytest.mark.parametrize(("name", "options"), KINDS)
def test_no_hidden_units(name, options, batch, isa, threads):
    for n in (1, 2):
        threads(n)
        check(name, (batch, 3, 4), 0, torch.float32, num_layers=2, bidirectional=True, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "options"), KINDS)
def test_cells_equal_their_twins(name, options, dtype, isa):
    def call(f):
        def cell(x, h, params, c=None):
            return f(x, h if c is None else (h, c), *params, **options)

        return cell

    for batch, inputs, hidden, bias in ((1, 1, 1, True), (3, 5, 7, False), (2, 40, 33, True)):
        x, h, c = torch.randn(inputs, batch).T, torch.randn(batch, 2 * hidden)[:, ::2], torch.randn(batch, hidden + 1)
        given = {"x": x, "h": h} | ({"c": c[:, 1:]} if name == "lstm" else {})
        given = {k: v.to(dtype) for k, v in given.items()}
        given["params"] = to(dtype, *parameters(name, inputs, hidden, bias=bias))
        check_twin(call(getattr(ops, name + "_cell")), call(getattr(reference, name + "_cell")), given, slack=32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "options"), KINDS)
@pytest.mark.parametrize(("inputs", "hidden"), [(5, 7), (300, 270), (64, 64)])
def test_a_sequence_has_the_bits_of_its_steps(name, options, inputs, hidden, dtype, isa):
    x, p = torch.randn(5, 9, inputs).to(dtype), to(dtype, *parameters(name, inputs, hidden))
    h, c = torch.randn(2, 1, 5, hidden).to(dtype)
    state = (h, c) if name == "lstm" else h
    y, last = getattr(ops, name)(x, p, state, **options)
    ours, twin = (getattr(module, name + "_cell") for module in (ops, reference))
    for f, sequence in ((ours, getattr(ops, name)), (twin, getattr(reference, name))):
        y, last = sequence(x, p, state, **options)
        s = (h[0], c[0]) if name == "lstm" else h[0]
        for t in range(9):
            s = f(x[:, t], s, *p, **options)
            if f is ours or dtype == torch.float32:
                out = s[0] if name == "lstm" else s
                assert torch.equal(out, y[:, t]) if f is ours else torch.allclose(out, y[:, t], atol=1e-5)
        if f is ours:
            assert all(torch.equal(a, b[0]) for a, b in zip(flat(s), flat(last), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "options"), KINDS)
@pytest.mark.parametrize("hidden", [20, 150])
def test_same_bits_alone_in_any_batch_padding_pieces_and_threads(name, options, hidden, dtype, isa, threads):
    f = getattr(ops, name)
    batch, time, inputs = 37, 11, 30
    lengths = torch.randint(0, time + 1, (batch,))
    lengths[:3] = torch.tensor([time, 0, 1])
    x, p = torch.randn(batch, time, inputs).to(dtype), to(dtype, *parameters(name, inputs, hidden, 2, 2))
    h, c = torch.randn(2, 4, batch, hidden).to(dtype)
    options = options | {"num_layers": 2, "bidirectional": True}

    def run(rows, length, **more):
        state = (h[:, rows], c[:, rows]) if name == "lstm" else h[:, rows]
        return flat(f(x[rows, :length], p, state, **options, **more))

    results = []
    for n in (1, 2, 5):
        threads(n)
        results.append(run(slice(None), time, lengths=lengths))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    for b in (0, 1, 2, 5, 36):
        length = int(lengths[b])
        y, *states = run(slice(b, b + 1), length)
        assert torch.equal(y[0], results[0][0][b, :length])
        assert (results[0][0][b, length:] == 0).all()
        assert all(torch.equal(s[:, 0], r[:, b]) for s, r in zip(states, results[0][1:], strict=True))

    # In pieces, one direction, the state carried.
    p = to(dtype, *parameters(name, inputs, hidden, 2))
    whole, pieces, state = flat(f(x, p, num_layers=2)), [], None
    for piece in x.split([1, 4, 6], 1):
        y, state = f(piece, p, state, num_layers=2)
        pieces.append(y)
    assert torch.equal(torch.cat(pieces, 1), whole[0])
    assert all(torch.equal(a, b) for a, b in zip(flat(state), whole[1:], strict=True))


def test_many_steps_of_bf16_have_the_bits_of_their_sequence(isa):
    x, p = torch.randn(8, 600, 32).bfloat16(), to(torch.bfloat16, *parameters("rnn", 32, 32, 1))
    whole, state = ops.rnn(x, p)[0], None
    for t in range(600):
        y, state = ops.rnn(x[:, t : t + 1], p, state)
        assert torch.equal(y, whole[:, t : t + 1]), t


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_gradients_have_the_same_bits_for_any_threads(name, options, kernels, threads):
    x, p = torch.randn(9, 70, 66), parameters(name, 66, 70, 2)
    leaves = [t.requires_grad_() for t in (x, *p)]
    results = []
    for n in (1, 2, 5):
        threads(n)
        y, _ = getattr(ops, name)(x, p, num_layers=2, **options)
        results.append(torch.autograd.grad(y.sin().sum(), leaves))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_padding_may_hold_anything():
    x, p = torch.randn(3, 4, 5), [t.requires_grad_() for t in parameters("lstm", 5, 6, 2)]
    lengths = torch.tensor([2, 4, 0])
    clean = torch.autograd.grad(ops.lstm(x, p, num_layers=2, lengths=lengths)[0].sum(), p)
    x[0, 2:], x[2] = torch.nan, torch.inf
    dirty = torch.autograd.grad(ops.lstm(x, p, num_layers=2, lengths=lengths)[0].sum(), p)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


@pytest.mark.parametrize("name", ["rnn", "gru", "lstm"])
def test_takes_the_parameters_of_torch(name):
    kind = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[name]
    model = kind(20, 30, num_layers=2, bidirectional=True, batch_first=True)
    x = torch.randn(4, 9, 20)
    ours = flat(getattr(ops, name)(x, list(model.parameters()), num_layers=2, bidirectional=True))
    for a, b in zip(ours, flat(model(x)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_nan_and_infinity_are_not_hidden():
    for name, options in KINDS:
        p = parameters(name, 4, 5)
        x = torch.randn(2, 3, 4)
        x[1, 1, 2] = torch.nan
        y, _ = getattr(ops, name)(x, p, **options)
        assert y[1, 1:].isnan().all() and y[0].isfinite().all() and y[1, 0].isfinite().all()


def test_errors_name_the_argument():
    x, p = torch.randn(2, 3, 4), parameters("gru", 4, 5)
    with pytest.raises(ValueError, match=r"\[gru\] x must have 3 dimensions, but got \(2, 4\)"):
        ops.gru(x[:, 0], p)
    with pytest.raises(ValueError, match=r"params must be 6 or 12 tensors.*but got 4"):
        ops.gru(x, p, num_layers=3)
    with pytest.raises(ValueError, match=r"\[gru\] w_ih must have shape \(15, 4\), but got \(15, 3\)"):
        ops.gru(x, [p[0][:, 1:], *p[1:]])
    with pytest.raises(ValueError, match=r"\[gru\] w_hh must have shape \(15, 5\), but got \(14, 5\)"):
        ops.gru(x, [p[0], p[1][1:], *p[2:]])
    with pytest.raises(ValueError, match=r"\[gru\] b_hh must have shape \(15,\), but got \(5,\)"):
        ops.gru(x, [*p[:3], torch.ones(5)])
    with pytest.raises(TypeError, match=r"\[gru\] w_hh must be float32, but got bfloat16"):
        ops.gru(x, [p[0], p[1].bfloat16(), *p[2:]])
    with pytest.raises(TypeError, match=r"\[gru\] x must be float32, bfloat16 or float16, but got int64"):
        ops.gru(x.long(), p)
    with pytest.raises(ValueError, match=r"\[gru\] a state must have shape \(1, B, H\), but got \(2, 2, 5\)"):
        ops.gru(x, p, torch.zeros(2, 2, 5))
    with pytest.raises(ValueError, match=r"\[gru\] h0 must have shape \(2, 5\), but got \(3, 5\)"):
        ops.gru(x, p, torch.zeros(1, 3, 5))
    with pytest.raises(ValueError, match=r"\[gru\] lengths must be 0 to 3, but got 4 for sequence 1"):
        ops.gru(x, p, lengths=torch.tensor([3, 4]))
    with pytest.raises(ValueError, match=r"\[gru\] lengths must have shape \(2,\), but got \(3,\)"):
        ops.gru(x, p, lengths=torch.tensor([3, 1, 1]))
    with pytest.raises(TypeError, match=r"\[gru\] lengths must be int64, but got int32"):
        ops.gru(x, p, lengths=torch.tensor([3, 1]).int())
    with pytest.raises(ValueError, match=r"\[gru\] dropout must be at least 0 and less than 1, but got 1"):
        ops.gru(x, p, dropout=1.0)
    with pytest.raises(ValueError, match=r"\[rnn\] nonlinearity must be 'tanh' or 'relu', but got 'sin'"):
        ops.rnn(x, parameters("rnn", 4, 5), nonlinearity="sin")
    p = parameters("lstm", 4, 5)
    for cell in (p, [t.clone().requires_grad_() for t in p]):
        with pytest.raises(ValueError, match=r"\[lstm_cell\] (h|h0) must have shape \(2, 5\), but got \(2, 6\)"):
            ops.lstm_cell(x[:, 0], (torch.zeros(2, 6), torch.zeros(2, 5)), *cell)
        with pytest.raises(ValueError, match=r"\[lstm_cell\] (c|c0) must have shape \(2, 5\), but got \(3, 5\)"):
            ops.lstm_cell(x[:, 0], (torch.zeros(2, 5), torch.zeros(3, 5)), *cell)
