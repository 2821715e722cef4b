import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

import pyllm
from pyllm import _C, nn, ops
from pyllm.data import SequenceLoader, embedded_corpus, split
from pyllm.quantization import FORMATS, quantize_weight
from pyllm.quantization.compensation import quantize_compensated


def decoder(**options):
    torch.manual_seed(1)
    return pyllm.Decoder(50, 64, 2, 4, num_kv_heads=2, context_length=80, intermediate_size=80, **options).eval()


MODELS = {
    "decoder": decoder,
    "untied": lambda: decoder(tie_embeddings=False, bias=True, qkv_bias=True),
    "softcap": lambda: decoder(logit_softcap=20.0),
    "rnn": lambda: pyllm.LanguageModel(50, 40, 2, 0.0, cell="rnn").eval(),
    "gru": lambda: pyllm.LanguageModel(50, 40, 2, 0.0, cell="gru").eval(),
    "lstm": lambda: pyllm.LanguageModel(50, 40, 2, 0.0, cell="lstm").eval(),
    "rwkv": lambda: pyllm.RWKV(50, 64, 2).eval(),
    "encoder": lambda: pyllm.Encoder(50, 64, 2, 4, head="masked_lm", context_length=64).eval(),
    "encoder-decoder": lambda: pyllm.EncoderDecoder(50, 64, 2, 4, context_length=80).eval(),
    "experts": lambda: decoder(num_experts=3, active_experts=2),
}
ids = torch.randint(50, (3, 20), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("bits", "minimums", "bound"), [(8, False, 0.006), (8, True, 0.005), (4, False, 0.09), (4, True, 0.08)]
)
@pytest.mark.parametrize("shape", [(40, 96), (7, 33), (1, 1)])
def test_a_quantised_weight_is_near(shape, bits, minimums, bound):
    weight = torch.randn(shape)
    quantized = quantize_weight(weight, bits, minimums=minimums)
    assert quantized.shape == shape and (quantized.minimums is not None) == minimums
    near = quantized.dequantize()
    assert (near - weight).norm() <= bound * weight.norm()


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_on_the_grid_already_is_kept(bits):
    whole = torch.randint(0, 2**bits, (5, 64)) - 2 ** (bits - 1)
    whole[:, ::32] = -(2 ** (bits - 1))  # so that the largest scale is the right one
    weight = whole * 0.25
    assert torch.equal(quantize_weight(weight, bits).dequantize(), weight)
    assert torch.equal(quantize_weight(torch.zeros(3, 40), bits).dequantize(), torch.zeros(3, 40))
    assert torch.equal(
        quantize_weight(torch.full((3, 40), 0.5), bits, minimums=True).dequantize(), torch.full((3, 40), 0.5)
    )


def test_searching_for_scales_beats_taking_those_of_the_largest_elements():
    weight = torch.randn(64, 256)
    grouped = weight.unflatten(1, (-1, 32))
    scale = grouped.abs().amax(-1, keepdim=True) / 7
    plain = ((grouped / scale).round() * scale).flatten(1)
    assert (quantize_weight(weight, 4).dequantize() - weight).norm() < 0.9 * (plain - weight).norm()


def test_importance_moves_the_error_to_where_it_counts_less():
    weight, importance = torch.randn(64, 64), torch.ones(64)
    importance[::2] = 100.0
    even = (quantize_weight(weight, 4).dequantize() - weight)[:, ::2].norm()
    assert (quantize_weight(weight, 4, importance=importance).dequantize() - weight)[:, ::2].norm() < 0.95 * even


@pytest.mark.parametrize("minimums", [False, True])
def test_compensation_brings_the_outputs_nearer(minimums):
    x, weight = torch.randn(2000, 30) @ torch.randn(30, 70), torch.randn(40, 70)  # inputs that go together
    x[:, 5] = 0.0  # an input that never comes
    exact = x @ weight.T

    def error(quantized):
        return (x @ quantized.dequantize().T - exact).norm()

    plain = error(quantize_weight(weight, 4, minimums=minimums))
    assert error(quantize_compensated(weight, x.T @ x, 4, minimums=minimums)) < 0.6 * plain


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("kind", MODELS)
def test_a_quantised_model_computes_learns_about_its_inputs_and_comes_back(kind, weights, tmp_path):
    model = MODELS[kind]()
    given = model.pair(ids, ids) if model.answers else ids
    count, before = model.num_parameters(), model(given)
    steps = []
    report = model.quantize(weights, progress=lambda *step: steps.append(step))
    assert model.num_parameters() == count and report.bytes_after < report.bytes_before
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Quantizable)}
    quantised = [name for name, m in layers.items() if not isinstance(m, nn.Embedding)]
    assert quantised == list(dict.fromkeys(name.partition(".weight_")[0] for name in report.layers))
    assert steps == [(n + 1, len(report.layers)) for n in range(len(report.layers))]
    after = model(given)
    assert 0 < (after - before).norm() < (0.05 if weights == "int8" else 0.3) * before.norm()
    assert math.isfinite(model.loss(given, ids).item())

    pyllm.save(model, tmp_path)
    again, _ = pyllm.load(tmp_path)
    assert torch.equal(again(given), after)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert again.num_bytes() == model.num_bytes()
    copied = copy.deepcopy(model)
    assert torch.equal(copied(given), after)


@pytest.mark.parametrize("calibration", [None, [ids]])
@pytest.mark.parametrize(("weights", "group", "bound"), [("int8", 128, 2), ("int4", 128, 1.3), ("int4-min", 64, 1.3)])
def test_larger_groups_are_coarser_and_come_back(weights, group, bound, calibration, tmp_path):
    errors = []
    for size in (32, group):
        torch.manual_seed(1)
        model = pyllm.Decoder(50, 64, 2, 4, context_length=64, intermediate_size=144).eval()
        before = model(ids)
        model.quantize(weights, group=size, calibration=calibration)
        errors.append((model(ids) - before).norm())
    assert 0.8 * errors[0] < errors[1] < bound * errors[0]
    assert {w.group for w in model.quantized_weights()} == {group} and not pyllm.check(model)
    pyllm.save(model, tmp_path)
    assert torch.equal(pyllm.load(tmp_path)[0](ids), model(ids))
    with pytest.raises(ValueError, match="group must be 32, 64, 128 or 256, but got 16"):
        pyllm.quantize(decoder(), weights, group=16)


@pytest.mark.parametrize("minimums", [False, True])
@pytest.mark.parametrize("group", [64, 128, 256])
@pytest.mark.parametrize("compensated", [False, True])
def test_scales_of_larger_groups_of_four_bits_are_multiples_of_a_unit(group, minimums, compensated):
    """Of weights of all sizes that float16 has scales for, and of zeros; packing refuses what is not one."""
    weight = torch.randn(24, 300) * 2.0 ** torch.randint(-6, 3, (24, 300))
    weight[3:12] *= 2.0 ** torch.linspace(-26, 12, 9)[:, None]
    weight[0], weight[1], weight[2, :40] = 0.0, 0.5, 0.0
    if compensated:
        x = torch.randn(500, 300)
        quantized = quantize_compensated(weight, x.T @ x, 4, minimums=minimums, group=group)
    else:
        quantized = quantize_weight(weight, 4, minimums=minimums, importance=torch.rand(300), group=group)
    assert torch.equal(ops.pack_quantized(quantized).unpack().scales, quantized.scales)
    near = quantized.dequantize()
    assert ((near - weight).norm(dim=1) <= 0.2 * weight.norm(dim=1) + 1e-6).all()
    assert torch.equal(near[0], weight[0])


@pytest.mark.parametrize(("minimums", "bound"), [(False, 1.1), (True, 1.15)])
def test_units_cost_little(minimums, bound):
    weight = torch.randn(64, 512)
    errors = [(quantize_weight(weight, 4, minimums=minimums, group=g).dequantize() - weight).square().sum()
              for g in (32, 64, 128, 256)]  # fmt: skip
    assert max(errors) < bound * errors[0]


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("kind", MODELS)
def test_quantised_models_keep_the_contract(kind, weights):
    model = MODELS[kind]()
    pyllm.quantize(model, weights)
    length = min(model.context_length or 70, 70)  # in pieces of 1, 7 and 64
    assert not pyllm.check(model, length=length, trials=2)


def test_layers_can_be_left_alone():
    model = decoder()
    report = pyllm.quantize(model, "int8", skip=("head", "*.down"))
    assert report.layers == tuple(
        f"blocks.{i}.{n}" for i in range(2) for n in ("attention.qkv", "attention.out", "feed_forward.up")
    )
    assert model.head.packed is None and model.head.weight is model.embedding.weight
    assert pyllm.quantize(model, "int4").layers == ("blocks.0.feed_forward.down", "blocks.1.feed_forward.down", "head")
    with pytest.raises(ValueError, match="skip must name layers"):
        pyllm.quantize(decoder(), "int8", skip=("lm_head",))
    with pytest.raises(ValueError, match="must be one of int8, int4, int4-min, but got 'int3'"):
        pyllm.quantize(decoder(), "int3")
    with pytest.raises(ValueError, match=r"model must have linear or recurrent layers"):
        pyllm.quantize(model, "int8")


def test_weights_of_recurrent_layers_can_be_left_alone():
    model = MODELS["gru"]()
    report = pyllm.quantize(model, "int4", skip=("rnn.weight_hh*", "head"))
    assert report.layers == ("rnn.weight_ih_l0", "rnn.weight_ih_l1")
    assert model.rnn.weight_ih_l0 is None and model.rnn.weight_hh_l0 is not None and model.head.packed is None
    assert not pyllm.check(model)
    assert pyllm.quantize(model, "int8", skip=("rnn",)).layers == ("head",)


class Stepped(torch.nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, state=None) -> Tensor:
        for row in x.unbind(1):
            state = self.cell(row, state)
        return state


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_a_quantised_cell_is_a_step_of_its_layer_and_comes_back(kind):
    cell, layer = getattr(nn, f"{kind}Cell")(10, 20), getattr(nn, kind)(10, 20, batch_first=True)
    layer.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    for name in cell.sizes():
        cell.quantize_(quantize_weight(getattr(cell, name), 8), name)
        layer.quantize_(cell.quantized[name], f"{name}_l0")
    assert cell.weight_hh is None and layer.weight_ih_l0 is None and layer._flat_weights[0] is None
    x = torch.randn(3, 6, 10)
    last, (_, expected) = Stepped(cell)(x), layer(x)
    last, expected = (last[0], expected[0]) if kind == "LSTM" else (last, expected)
    assert torch.equal(last, expected[0])
    again = getattr(nn, f"{kind}Cell")(10, 20)
    again.load_state_dict(cell.state_dict())
    assert torch.equal(flat(again(x[:, 0]))[0], flat(cell(x[:, 0]))[0])


def flat(out):
    return out if isinstance(out, tuple) else (out,)


def test_the_head_gets_eight_bits():
    model = decoder()
    pyllm.quantize(model, "int4")
    assert model.head.packed.bits == 8 and model.blocks[0].attention.qkv.packed.bits == 4


@pytest.mark.parametrize(
    ("make", "portion"),
    [
        (lambda: pyllm.Decoder(20, 32, 2, 2, context_length=40), 1 << 27),
        (lambda: pyllm.Decoder(20, 32, 2, 2, context_length=40), 1),
        (lambda: pyllm.LanguageModel(20, 48, 2, cell="lstm"), 1 << 27),
        (lambda: pyllm.LanguageModel(20, 48, 2, cell="gru"), 1),
    ],
)
def test_calibration_keeps_the_loss_lower(make, portion, monkeypatch):
    monkeypatch.setattr("pyllm.quantization.model._MOMENTS", portion)
    torch.manual_seed(3)
    model = make()
    text = torch.arange(4 * 33).view(4, 33) * 7 % 20
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(text[:, :-1], text[:, 1:]).backward()
        optimizer.step()
    model.eval()

    def away(calibration: list[Tensor] | None) -> float:
        other = copy.deepcopy(model)
        pyllm.quantize(other, "int4", calibration=calibration)
        with torch.no_grad():
            return float((model(text) - other(text)).norm())

    assert away([text[:2], text[2:]]) < 0.9 * away(None)


def test_a_trained_lstm_keeps_its_perplexity(tmp_path):
    """The README's classic program."""
    text = embedded_corpus()[:80_000]
    tokenizer = pyllm.Tokenizer.train("char", [text])
    training, validation = (tokenizer.encode(part) for part in split(text, 0.1))
    torch.manual_seed(5)
    model = pyllm.LanguageModel(tokenizer.vocab_size, hidden_size=64, num_layers=2, cell="lstm")
    pyllm.train(model, SequenceLoader(training, 16, 32), torch.optim.Adam(model.parameters(), 1e-2), epochs=1,
                progress=False)  # fmt: skip
    held_out = SequenceLoader(validation, 4, 32)
    before = pyllm.test(model.eval(), held_out).perplexity
    assert before < 0.3 * tokenizer.vocab_size
    for weights, bound, bits in (("int8", 0.002, 9), ("int4", 0.03, 5.7), ("int4-min", 0.03, 6.1)):
        other = copy.deepcopy(model)
        other.quantize(weights)
        after = pyllm.test(other, held_out).perplexity
        assert abs(after - before) < bound * before
        assert sum(8 * w.nbytes for w in other.quantized_weights()) < bits * sum(
            math.prod(w.shape) for w in other.quantized_weights()
        )
        pyllm.save(other, tmp_path / weights, tokenizer)
        assert pyllm.test(pyllm.load(tmp_path / weights)[0], held_out).perplexity == after


def test_gradients_pass_through_to_what_comes_before():
    model = decoder(tie_embeddings=False)
    pyllm.quantize(model, "int8")
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    assert model.embedding.weight.grad.abs().sum() > 0 and model.blocks[0].attention_norm.weight.grad is not None


class Adapter(torch.nn.Module):
    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer, (n, k) = layer, layer.sizes()["weight"]
        self.down = torch.nn.Parameter(torch.randn(8, k) / k**0.5)
        self.up = torch.nn.Parameter(torch.zeros(n, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.down.T @ self.up.T


def test_an_adapter_trains_on_top():
    model = decoder()
    pyllm.quantize(model, "int4")
    before = model.state_dict()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for block in model.blocks:
        block.attention.qkv = Adapter(block.attention.qkv)
        block.feed_forward.down = Adapter(block.feed_forward.down)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 8
    optimizer, losses = torch.optim.AdamW(trained, 3e-2), []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(model.loss(ids[:, :-1], ids[:, 1:]))
        losses[-1].backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    after = model.state_dict()
    assert torch.equal(before["head.weight.panels"], after["head.weight.panels"])


@pytest.mark.parametrize("shape", [(49, 32), (50, 31)])
def test_a_table_of_another_size_is_refused_though_its_panels_would_fit(shape):
    layers = [pyllm.nn.Linear(k, n, bias=False) for n, k in (shape, (50, 32))]
    for layer in layers:
        layer.quantize_(quantize_weight(layer.weight, 8))
    before, state = layers[1].packed, layers[0].state_dict()
    with pytest.raises(ValueError, match=rf"must have shape \(50, 32\), but got \({shape[0]}, {shape[1]}\)"):
        layers[1].load_state_dict(state)
    assert layers[1].packed is before
    state["weight.layout"] = state["weight.layout"][:4]  # as they were saved before they said their shape
    layers[0].load_state_dict(state)


def test_a_tied_table_is_held_and_saved_once(tmp_path):
    model = decoder()
    count = model.num_parameters()
    pyllm.quantize(model, "int4")
    assert model.embedding.packed is model.head.packed and model.num_parameters() == count
    pyllm.save(model, tmp_path)
    (file,) = tmp_path.glob("*/model.safetensors")
    assert file.stat().st_size < model.num_bytes() + 8192
    for other in (pyllm.load(tmp_path)[0], copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.embedding.packed is other.head.packed
        assert torch.equal(other(ids), model(ids)) and other.num_bytes() == model.num_bytes()
    half, _ = pyllm.load(tmp_path, dtype=torch.bfloat16)
    assert half.embedding(ids).dtype == half(ids).dtype == torch.bfloat16
    assert torch.equal(half.embedding(ids), model.embedding(ids).bfloat16())
    encoder = MODELS["encoder"]()
    pyllm.quantize(encoder, "int8")
    assert encoder.with_head("masked_lm").head.decoder.packed is encoder.embedding.packed


def test_weights_that_are_not_finite_are_refused():
    model = decoder()
    with torch.no_grad():
        model.head.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="must be finite"):
        pyllm.quantize(model, "int8")
    with pytest.raises(ValueError, match="at most 65504"):
        quantize_weight(torch.full((2, 32), 1e5), 8)


@pytest.mark.parametrize("gguf", [False, True])
def test_a_quantised_model_has_no_form_for_others(gguf, tmp_path):
    model = decoder()
    model.quantize("int8")
    with pytest.raises(ValueError, match=r"^embedding is quantised"):
        model.save(tmp_path / "other", gguf=gguf)
    assert not list(tmp_path.iterdir())


def test_the_layer_takes_only_its_own_shape():
    layer = nn.Linear(8, 5)
    with pytest.raises(ValueError, match=r"must have shape \(5, 8\), but got \(5, 9\)"):
        layer.quantize_(quantize_weight(torch.randn(5, 9), 8))
    assert layer.packed is None


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("mapped", [True, False])
def test_what_another_instruction_set_packed_is_loaded(isa, weights, mapped, tmp_path):
    there = _C.info()["isa"]
    _C.set_isa("baseline" if there != "baseline" else _C.info()["isas"][-1])
    model = decoder()
    model.quantize(weights)
    pyllm.save(model, tmp_path)
    _C.set_isa(there)
    again, _ = pyllm.load(tmp_path, mapped=mapped)
    assert again.embedding.packed is again.head.packed
    for name, layer in again.named_modules():
        if isinstance(layer, nn.Quantizable) and layer.packed is not None:
            assert layer.packed.width == _C.panel_width()
            was = model.get_submodule(name).packed
            assert torch.equal(layer.packed.unpack().dequantize(), was.unpack().dequantize())
    assert again(ids).isfinite().all()
