import pytest
import torch

import pyllm
from pyllm import nn
from pyllm.engine import why_unrecorded
from pyllm.models import Model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["rnn", "gru", "lstm", "gpt", "rwkv"])
def test_the_models_keep_the_contract(kind, dtype):
    if kind == "rwkv":
        model = pyllm.RWKV(50, 32, 2, head_dim=16)
        for parameter in model.parameters():  # some begin as zeros, behind which nothing would be seen
            torch.nn.init.normal_(parameter, std=0.5)
    else:
        model = pyllm.Decoder(50, 32, 2, 4) if kind == "gpt" else pyllm.LanguageModel(50, 32, 2, cell=kind)
    threads = pyllm.num_threads()
    assert pyllm.check(model.to(dtype), length=70) == []  # in pieces of 1, 7 and 64
    assert model.training and pyllm.num_threads() == threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("position", ["relative", "learned", "sinusoidal"])
def test_encoder_decoders_keep_the_contract(position, dtype):
    model = pyllm.EncoderDecoder(50, 32, 2, 4, position=position, context_length=40, post_norm=position != "relative")
    assert pyllm.check(model.to(dtype)) == []
    model.decoder.blocks[1].cross_attention.out = Averaging()
    ways = {d.way: d.module for d in pyllm.check(model)}
    assert ways["each row alone"] == ways["in pieces of 7"] == ways["padded"] == "decoder.blocks.1.cross_attention.out"
    model.encoder.blocks[0].feed_forward = Averaging()
    ways = {d.way: d.module for d in pyllm.check(model)}
    assert ways["each row alone"] == "encoder.blocks.0.feed_forward"
    with pytest.raises(ValueError, match="the model's context is 40 tokens, but got 41 ids"):
        pyllm.check(model, length=41)


class Averaging(torch.nn.Module):
    """Looks at the rest of its call: no two ways of running it agree."""

    def forward(self, x):
        return x + x.mean((0, 1))


class OwnModel(Model):
    """An architecture that the package does not have: a recurrent layer whose output a gate lets through."""

    model_type = "own"

    def __init__(self, vocab_size, hidden_size, broken=False):
        super().__init__()
        self.config = {"vocab_size": vocab_size, "hidden_size": hidden_size, "broken": broken}
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.gru = nn.GRU(hidden_size, hidden_size, batch_first=True)
        self.mixing = Averaging() if broken else torch.nn.Identity()
        self.feed_forward = nn.FeedForward(hidden_size, 2 * hidden_size)
        self.head = nn.Linear(hidden_size, vocab_size)

    def hidden(self, ids, state=None, lengths=None):
        x = self.embedding(ids)
        y, last = self.gru(x, None if state is None else state.vectors[0], lengths)
        if state is not None:
            state.advance((last,), ids.shape[1] if lengths is None else lengths)
        return y + self.feed_forward(self.mixing(y))

    def new_state(self, batch_size, max_length=None):
        return nn.RecurrentState(torch.zeros(1, batch_size, self.gru.hidden_size, dtype=self.dtype))


def test_a_model_of_the_users_own_trains_generates_and_is_checked():
    text = "the fox lives by the sea. " * 40
    tokenizer = pyllm.Tokenizer.train("char", [text])
    torch.manual_seed(0)
    model = OwnModel(tokenizer.vocab_size, 24)
    assert pyllm.check(model) == []
    loader = pyllm.data.SequenceLoader(tokenizer.encode(text), 4, 16)
    history = pyllm.train(model, loader, torch.optim.Adam(model.parameters(), 0.02), epochs=6, progress=False)
    assert history.losses[-1] < 0.3
    assert pyllm.generate(model, tokenizer, "the fox ", max_tokens=17, temperature=0) == "lives by the sea."


def test_a_model_of_the_users_own_is_quantised_and_recorded():
    model = OwnModel(40, 32)
    assert why_unrecorded(model) is None
    report = model.quantize("int4")
    assert report.layers[:2] == ("gru.weight_ih_l0", "gru.weight_hh_l0") and len(report.layers) == 5
    assert why_unrecorded(model) is None and pyllm.check(model, length=70) == []


def test_what_breaks_the_contract_is_named():
    found = pyllm.check(OwnModel(30, 16, broken=True))
    assert {d.way for d in found} >= {"in pieces of 1", "in pieces of 7", "each row alone"}
    assert {d.module for d in found} == {"mixing"}
    assert "mixing first differs, in row 0 at position 0" in str(found[0])
    with pytest.raises(ValueError, match="at least 2"):
        pyllm.check(OwnModel(30, 16), length=1)


@pytest.mark.parametrize("kind", ["window", "int8", "gru", "t5"])
def test_a_request_in_an_engine_is_tried(kind, monkeypatch):
    if kind == "gru":
        model = pyllm.LanguageModel(40, 16, 1, cell="gru")
    elif kind == "t5":
        model = pyllm.EncoderDecoder(40, 16, 1, 2)
    else:
        model = pyllm.Decoder(40, 32, 1, 2, context_length=200, window=70 if kind == "window" else None)
    if kind == "int8":
        model.quantize("int8")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    done = []
    assert pyllm.check(model, trials=8, neighbours=15, progress=done.append) == []
    assert done == list(range(1, 9))
    step = pyllm.engine.steps.Steps._step
    monkeypatch.setattr("pyllm.engine.steps.Steps._step",
                        lambda self, count: step(self, count) * (1.001 if count > 1 else 1))  # fmt: skip
    (found,) = pyllm.check(model, trials=8)
    assert found.way.startswith("in an engine, among") and not found.module and found.largest > 0
    assert "the model first differs, in row 0 at position" in str(found)
    assert pyllm.check(model, trials=8, neighbours=0) == pyllm.check(model, trials=0) == []
    with pytest.raises(ValueError, match="trials and neighbours must be at least 0, but got -1 and 7"):
        pyllm.check(model, trials=-1)
