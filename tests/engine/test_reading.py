"""Scores and embeddings: of texts that are read among requests, in pieces, with the bits that they have alone."""

import pytest
import torch

import pyllm
from pyllm.engine.reading import Embedding, Scoring
from pyllm.reference.sample import distribution

KINDS = ["llama", "window", "lstm", "rwkv", "int8"]
SETTINGS = [pyllm.SamplingParams(), pyllm.SamplingParams(temperature=0),
            pyllm.SamplingParams(temperature=1.4, top_p=0.9, repetition_penalty=1.3, frequency_penalty=0.2),
            pyllm.SamplingParams(top_k=5, logit_bias=torch.linspace(-1, 1, 40))]  # fmt: skip


def new(kind):
    torch.manual_seed(3)
    if kind == "lstm":
        return pyllm.LanguageModel(40, 16, 2)
    if kind == "rwkv":
        model = pyllm.RWKV(40, 24, 2, head_dim=8)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        return model
    window = {"window": 70} if kind == "window" else {}
    model = pyllm.Decoder(40, 32, 2, 4, num_kv_heads=2, context_length=300, **window)
    if kind == "int8":
        model.quantize("int8")
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_drawing(kind):
    model = new(kind)
    engine = pyllm.Engine(model, max_sequences=4, num_pages=24)
    prompts = [[i * n % 40 for i in range(n)] for n in (5, 70, 200)]
    for params in SETTINGS:
        for prompt, request in zip(prompts, engine.generate(prompts, params, max_tokens=20), strict=True):
            text = prompt + request.ids
            for other in (engine, pyllm.Engine(model, chunk=17, num_pages=24, reuse_prefixes=False)):
                _, score, _ = other.score([[1, 2], text, [3] * 50], params)
                assert score.ids.tolist() == text and score.logprobs.shape == (len(text) - 1,)
                assert score.logprobs[-20:].tolist() == request.logprobs
                assert score.processed_logprobs[-20:].tolist() == request.processed_logprobs
            with torch.no_grad():
                logits = model(torch.tensor([text]))[0, :-1]
            history = [text[: n + 1] + [-1] * (len(text) - n - 1) for n in range(len(text) - 1)]
            exact = distribution(logits.double(), history=torch.tensor(history), logit_bias=params.logit_bias,
                                 **params.settings())  # fmt: skip
            given = torch.tensor(text[1:])[:, None]
            for found, expected in ((score.logprobs, logits.log_softmax(-1)), (score.processed_logprobs, exact)):
                torch.testing.assert_close(found, expected.gather(1, given)[:, 0].float(), atol=1e-4, rtol=1e-4)
            assert torch.equal(score.first_choices, logits.argmax(-1) == given[:, 0])
    assert not engine._running and engine.score([]) == []
    (single,) = engine.score([[7]])
    assert single.ids.tolist() == [7] and len(single.logprobs) == len(single.first_choices) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_have_the_bits_that_they_have_alone(kind, threads):
    model = new(kind)
    texts = [[i * n % 40 for i in range(n)] for n in (1, 64, 65, 200)]
    engine = pyllm.Engine(model, num_pages=24)
    for pooling in ("mean", "last"):
        whole = engine.embed(texts, pooling=pooling, normalize=False)
        assert whole.dtype == torch.float32 and whole.shape == (4, model.head.in_features)
        with torch.no_grad():
            for text, found in zip(texts, whole, strict=True):
                hidden = model.hidden(torch.tensor([text]))[0]
                torch.testing.assert_close(found, hidden.mean(0) if pooling == "mean" else hidden[-1])
        normal = engine.embed(texts, pooling=pooling)
        torch.testing.assert_close(normal, whole / whole.norm(dim=1, keepdim=True))
        threads(1)
        for chunk in (7, 64):
            others = pyllm.Engine(model, chunk=chunk, num_pages=24, max_sequences=3)
            running = others.submit([4, 5, 6], max_tokens=200)
            assert torch.equal(others.embed(texts[::-1], pooling=pooling), normal.flip(0))
            assert running.reason is None
            running.cancel()
        threads(2)
    assert engine.embed([]).shape == (0, model.head.in_features)


def test_logits_are_never_held_whole(monkeypatch):
    model = new("llama")
    rows, head = [], model.head.forward
    monkeypatch.setattr(model.head, "forward", lambda h: (rows.append(h.numel() // 32), head(h))[1])
    pyllm.Engine(model).score([[1] * 300])
    assert max(rows) <= 64 and sum(rows) == 299


@pytest.mark.parametrize("kind", ["llama", "window", "lstm"])
def test_an_interrupted_reading_begins_again(kind, monkeypatch):
    model = new(kind)
    engine, text = pyllm.Engine(model, chunk=50, num_pages=8), [i % 40 for i in range(170)]
    other = engine.submit([1, 2, 3], pyllm.SamplingParams(seed=1), max_tokens=150)
    same = pyllm.Engine(model).submit([1, 2, 3], pyllm.SamplingParams(seed=1), max_tokens=150)
    while same.reason is None:
        same._engine.step()
    expected, (score,) = engine.embed([text]), engine.score([text])
    note, fails_at = type(engine.pool).note, []

    def interrupt(self, held, ids, length):
        note(self, held, ids, length)
        if length in fails_at:
            fails_at.clear()
            raise KeyboardInterrupt

    monkeypatch.setattr(type(engine.pool), "note", interrupt)
    for border in (50, 150, None):
        for reading in (Embedding(engine, text, "mean", True), Scoring(engine, text, pyllm.SamplingParams())):
            fails_at.append(border or len(reading.prompt))
            engine.queue(reading)
            while reading.reason is None:
                try:
                    engine.step()
                except KeyboardInterrupt:
                    assert reading.held is None
            assert not fails_at
            if isinstance(reading, Embedding):
                assert torch.equal(reading.vector, expected[0])
            else:
                assert all(torch.equal(a, b) for a, b in zip(reading.score, score, strict=True))
    while other.reason is None:
        engine.step()
    assert other.logprobs == same.logprobs


def test_what_is_wrong_is_raised_and_leaves_nothing():
    engine = pyllm.Engine(new("llama"), num_pages=2)
    for error, message, call in (
        (ValueError, "the 200 tokens of a text do not fit the engine's pages of 128",
         lambda: engine.score([[1, 2], [1] * 201])),
        (ValueError, "fit the model's context of 300", lambda: engine.embed([[1] * 301])),
        (IndexError, "40", lambda: engine.embed([[1, 40]])),
        (IndexError, "40", lambda: engine.score([[1, 40]])),
        (ValueError, "top_p", lambda: engine.score([[1, 2]], pyllm.SamplingParams(top_p=2))),
        (ValueError, "pooling must be one of mean, last, but got 'max'", lambda: engine.embed([[1]], pooling="max")),
        (ValueError, "at least one id", lambda: engine.score([[]])),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
        assert not engine._running and engine.pool.pages.available == 2
