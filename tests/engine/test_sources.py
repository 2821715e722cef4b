"""Encoder-decoders in an engine: answers with the bits that they have alone, whose sources are read once."""

import random

import pytest
import torch

import pyllm
from pyllm.engine import generate_ids
from pyllm.models import Pair

POST_NORM = {"norm": "layer_norm", "post_norm": True, "bias": True}
KINDS = {
    "t5": {"encoder_num_layers": 3, "head_dim": 5, "attention_scale": 1.0, "output_scale": 0.2, "max_distance": 17},
    "bart": POST_NORM | {"position": "learned", "position_offset": 2, "embedding_norm": True, "activation": "gelu",
                         "head_bias": True, "context_length": 150, "forced_bos_id": 5, "forced_eos_id": 2,
                         "eos_ids": [2]},
    "marian": POST_NORM | {"position": "sinusoidal", "embedding_scale": 5.0, "activation": "relu",
                           "encoder_num_heads": 2, "context_length": 150, "suppressed_ids": [0, 7], "start_id": 0},
    "int8": {},
}  # fmt: skip


def new(kind):
    torch.manual_seed(3)
    size = 32 if kind == "int8" else 24
    model = pyllm.EncoderDecoder(31, size, 2, 4, **KINDS[kind]).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.5)
    if kind == "int8":
        model.quantize("int8")
    return model


def alone(model, source, params, max_tokens):
    return [i for (i,) in generate_ids(model, [source], params, max_tokens=max_tokens)]


def finish(engine, requests):
    while any(r.reason is None for r in requests):
        engine.step()


@pytest.mark.parametrize("kind", KINDS)
def test_each_answer_is_as_if_alone(kind, threads):
    model, rng = new(kind), random.Random(2)
    sources = [[rng.randrange(8, 31) for _ in range(n)] for n in (1, 7, 64, 65, 130, 7)]
    sources.append(sources[1])
    settings = [pyllm.SamplingParams(temperature=t, repetition_penalty=r, seed=s)
                for s, (t, r) in enumerate(((1.0, 1.0), (0.0, 1.0), (0.8, 1.2)))]  # fmt: skip
    asked = [(source, rng.choice(settings), rng.randrange(1, 75)) for source in sources]
    threads(1)
    expected = [alone(model, *request) for request in asked]
    logprobs = {}
    for chunk, pages, count, speculate in ((1000, 5, 1, None), (7, 40, 1, "lookup"), (64, 40, 2, None)):
        engine = pyllm.Engine(model, max_sequences=4, num_pages=pages, chunk=chunk, speculate=speculate)
        threads(count)
        made = {}
        for i in rng.sample(range(7), 7):
            source, params, max_tokens = asked[i]
            made[i] = engine.submit(source, params, max_tokens=max_tokens, priority=rng.randrange(2))
            for _ in range(rng.randrange(4)):
                engine.step()
        finish(engine, made.values())
        for i, request in made.items():
            assert request.ids == expected[i] and request.source == asked[i][0]
            assert logprobs.setdefault(i, request.logprobs) == request.logprobs
        assert engine.pool.pages.available == pages and not engine.pool.live and engine.steps.recordable
    first = engine.submit(asked[1][0], settings[0], max_tokens=9, n=3)
    finish(engine, first.samples)
    for n, sample in enumerate(first.samples):
        assert sample.ids == alone(model, asked[1][0], pyllm.SamplingParams(seed=n), 9)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_embeddings(kind):
    model = new(kind)
    engine, rng = pyllm.Engine(model, num_pages=30), random.Random(4)
    sources = [[rng.randrange(8, 31) for _ in range(n)] for n in (5, 70)]
    params = pyllm.SamplingParams(temperature=1.2, top_k=9, repetition_penalty=1.1, seed=6)
    requests = engine.generate(sources, params, max_tokens=70)
    for chunk in (256, 9):
        other = pyllm.Engine(model, num_pages=30, chunk=chunk)
        scores = other.score([r.ids for r in requests], params, sources=sources)
        for request, score in zip(requests, scores, strict=True):
            count = len(request.ids) - (kind == "bart")  # all but the end that is forced by the length
            assert score.ids.tolist() == [model.config["start_id"], *request.ids]
            assert score.logprobs[:count].tolist() == request.logprobs[:count]
            assert score.processed_logprobs[:count].tolist() == request.processed_logprobs[:count]
    for source, vector in zip(sources, engine.embed(sources, normalize=False), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(vector, model.encode(torch.tensor([source])).hidden[0].mean(0))
    assert torch.equal(engine.embed(sources[1:]), engine.embed(sources)[1:])
    if kind != "bart":
        return
    ids = torch.tensor([requests[0].ids])
    with torch.no_grad():
        logits = model(Pair(torch.tensor([sources[0]]), model.pair(ids, ids).ids))[0]
    expected = logits.log_softmax(-1).gather(1, ids.T)[1:-1, 0]
    torch.testing.assert_close(torch.tensor(requests[0].logprobs[1:-1]), expected, atol=1e-5, rtol=1e-5)


def test_a_source_is_read_once_for_all_who_answer_it_and_with_others(monkeypatch):
    model = new("t5")
    engine, read, encode = pyllm.Engine(model, num_pages=20), [], model.encode
    monkeypatch.setattr(model, "encode", lambda ids, lengths: (read.append(tuple(ids.shape)), encode(ids, lengths))[1])
    requests = [engine.submit(source, max_tokens=3) for source in ([9] * 70, [9] * 70, [8], [7] * 5)]
    engine.step()
    assert read == [(3, 70)] and engine.pool.pages.available == 20 - 4 - 4
    requests.append(engine.submit([8], max_tokens=3))
    finish(engine, requests)
    assert read == [(3, 70)] and engine.pool.pages.available == 20
    engine.generate([[8]], max_tokens=1)
    assert len(read) == 2


def test_an_error_ends_one_answer_and_leaves_the_others_their_bits():
    model, params = new("marian"), pyllm.SamplingParams(seed=4)
    engine = pyllm.Engine(model, num_pages=4)
    asked = [([9] * 70, 64), ([31], 5), ([8], 5), ([9] * 151, 5), ([9] * 100, 129), ([9] * 100, 151)]
    requests = [engine.submit(source, params, max_tokens=n) for source, n in asked]
    finish(engine, requests)
    assert [r.reason for r in requests] == ["length", "error", "length", "error", "error", "error"]
    assert [requests[i].ids for i in (0, 2)] == [alone(model, *asked[i][:1], params, asked[i][1]) for i in (0, 2)]
    assert isinstance(requests[1].error, IndexError)
    for request, message in zip(requests[3:], ("151 tokens and 5 more do not fit the model's context of 150",
                                               "100 tokens and 129 more do not fit the engine's pages of 256",
                                               "100 tokens and 151 more do not fit the model's context of 150"),
                                strict=True):  # fmt: skip
        assert message in str(request.error)
    assert engine.pool.pages.available == 4 and not engine.pool.live
    with pytest.raises(ValueError, match="max_length or num_pages must be given"):
        pyllm.Engine(new("t5"))
    short = pyllm.Engine(new("t5"), max_length=30)
    assert "fit the engine's max_length of 64" in str(short.submit([1], max_tokens=65).error)
    for error, message, arguments in ((TypeError, "sources must be given for an encoder-decoder", {}),
                                      (ValueError, "sources must be 1", {"sources": []})):  # fmt: skip
        with pytest.raises(error, match=message):
            engine.score([[1, 2]], **arguments)


def test_an_interrupted_reading_of_a_source_begins_again(monkeypatch):
    model, params = new("t5"), pyllm.SamplingParams(seed=4)
    engine = pyllm.Engine(model, num_pages=8)
    request, write = engine.submit([9] * 70, params, max_tokens=5), pyllm.ops.write_pages

    def interrupt(*args):
        monkeypatch.setattr("pyllm.ops.write_pages", write)
        raise KeyboardInterrupt

    monkeypatch.setattr("pyllm.ops.write_pages", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    finish(engine, [request])
    assert request.ids == alone(model, [9] * 70, params, 5)


def test_texts_are_answered_as_by_the_plain_loop():
    words = ["fox", "sea", "owl", "a long one of them"]
    tokenizer = pyllm.Tokenizer.train("char", words)
    torch.manual_seed(2)
    model = pyllm.EncoderDecoder(tokenizer.vocab_size, 32, 1, 2, start_id=tokenizer.eos_id)
    engine = pyllm.Engine(model, tokenizer, max_length=40)
    params = pyllm.SamplingParams(seed=3)
    expected = pyllm.generate(model, tokenizer, words, max_tokens=20, seed=3)
    assert [r.text for r in engine.generate(words, params, max_tokens=20)] == expected
    assert ["".join(engine.stream(w, params, max_tokens=20)) for w in words] == expected
    (score,) = engine.score(["fox"], sources=["sea"])
    assert score.ids.tolist() == [tokenizer.eos_id, *tokenizer.encode("fox")]
