"""Prompts that are read together, padded to one length."""

import pytest
import torch

import pyllm

PARAMS = pyllm.SamplingParams(seed=4)
LENGTHS = (20, 21, 3, 22, 23, 64, 64, 100)


def new(kind):
    torch.manual_seed(3)
    if kind == "lstm":
        return pyllm.LanguageModel(40, 16, 1).eval()
    options = {"position": "learned", "norm": "layer_norm"} if kind == "learned" else {}
    return pyllm.Decoder(40, 16, 2, 4, context_length=110, window=70 if kind == "window" else None, **options).eval()


def shapes(model, monkeypatch):
    seen, hidden = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, *rest: (seen.append(tuple(ids.shape)), hidden(ids, *rest))[1])
    return seen


@pytest.mark.parametrize("kind", ["llama", "learned", "window", "lstm"])
def test_pieces_of_about_one_length_are_read_in_one_call(kind, monkeypatch):
    model = new(kind)
    prompts = [[(i * n) % 40 for i in range(n)] for n in LENGTHS]
    expected = [pyllm.Engine(model).generate([prompt], PARAMS, max_tokens=10)[0] for prompt in prompts]
    engine = pyllm.Engine(model, num_pages=16, chunk=1000)
    seen = shapes(model, monkeypatch)
    requests = [engine.submit(prompt, PARAMS, max_tokens=10) for prompt in prompts]
    engine.step()
    assert seen[:4] == [(1, 3), (4, 23), (2, 64), (1, 100)]
    while any(r.reason is None for r in requests):
        engine.step()
    assert [r.logprobs for r in requests] == [r.logprobs for r in expected]
    if kind != "lstm":
        assert engine.pool.pages.available == 16


def test_padding_stays_within_the_context_and_within_a_share(monkeypatch):
    model = new("learned")
    engine = pyllm.Engine(model, chunk=1000, max_sequences=16)
    long = [engine.submit([n] * 90, max_tokens=20) for n in range(2)]
    engine.step()
    known = engine.submit([0] * 64 + [5] * 30, max_tokens=10)  # has 64 already, and may not be padded beyond 110
    seen = shapes(model, monkeypatch)
    others = [engine.submit([n] * 50, max_tokens=5) for n in range(2, 4)]
    engine.step()
    assert (1, 30) in seen and (2, 50) in seen
    requests = [*long, known, *others]
    while any(r.reason is None for r in requests):
        engine.step()
    assert all(r.reason == "length" for r in requests)


@pytest.mark.parametrize("kind", ["llama", "lstm"])
def test_an_unknown_id_ends_its_request_alone(kind):
    model = new(kind)
    (expected,) = pyllm.Engine(model).generate([[5, 6, 7]], PARAMS, max_tokens=8)
    engine = pyllm.Engine(model)
    requests = [engine.submit(ids, PARAMS, max_tokens=8) for ids in ([5, 6, 7], [5, 6, 40], [5, 6, 7])]
    while any(r.reason is None for r in requests):
        engine.step()
    assert [r.reason for r in requests] == ["length", "error", "length"]
    assert requests[0].logprobs == requests[2].logprobs == expected.logprobs
    assert isinstance(requests[1].error, IndexError) and not engine._running
