import asyncio
import random

import pytest
import torch

import pyllm
from pyllm.engine import generate_ids

TEXT = "the quick brown fox jumps over the lazy dog; 古池や蛙飛び込む水の音 🐸. " * 3
DECODERS = {
    "llama": {"num_kv_heads": 2},
    "window": {"window": 70, "head_norm": True},
    "alibi": {"position": "alibi", "norm": "layer_norm"},
}
KINDS = ["lstm", "rwkv", *DECODERS]


def new(kind, vocab=40, context=400):
    torch.manual_seed(3)
    if kind in DECODERS:
        model = pyllm.Decoder(vocab, 16, 2, 4, context_length=context, **DECODERS[kind])
    elif kind == "rwkv":
        model = pyllm.RWKV(vocab, 24, 2, head_dim=8, decay_rank=4, rate_rank=5, value_rank=3, gate_rank=6)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    else:
        model = pyllm.LanguageModel(vocab, 16, 2, cell=kind)
    return model.eval()


def prompts(count, rng):
    shared = [rng.randrange(40) for _ in range(150)]
    made = [shared[: rng.randrange(150)] + [rng.randrange(40) for _ in range(rng.randrange(1, 50))]
            for _ in range(count)]  # fmt: skip
    return made


def alone(model, prompt, params, max_tokens):
    """The plain loop's ids."""
    return [i for (i,) in generate_ids(model, [prompt], params, max_tokens=max_tokens)]


@pytest.mark.parametrize("kind", KINDS)
def test_each_request_is_as_if_alone(kind, threads):
    """Whatever arrives when, beside whom, in which chunks, from a known prefix or not."""
    model, rng = new(kind), random.Random(1)
    draws = ((1.0, 1.0, 1.0), (0.0, 1.0, 1.0), (1.3, 0.9, 1.0), (0.8, 1.0, 1.2))
    settings = [pyllm.SamplingParams(temperature=t, top_p=p, repetition_penalty=r, seed=s)
                for s, (t, p, r) in enumerate(draws)]  # fmt: skip
    asked = [(prompt, rng.choice(settings), rng.randrange(1, 70)) for prompt in prompts(6, rng)]
    expected = [alone(model, *request) for request in asked]
    logprobs = {}
    for chunk, pages, reuse in ((1000, 12, True), (7, 60, True), (64, 60, False)):
        engine = pyllm.Engine(model, max_sequences=4, num_pages=pages, chunk=chunk, reuse_prefixes=reuse)
        threads(rng.choice((1, 2)))
        order, made = rng.sample(range(6), 6), {}
        for i in order:
            prompt, params, max_tokens = asked[i]
            made[i] = engine.submit(prompt, params, max_tokens=max_tokens, priority=rng.randrange(2))
            for _ in range(rng.randrange(6)):
                engine.step()
        while any(r.reason is None for r in made.values()):
            engine.step()
        for i, request in made.items():
            assert request.ids == expected[i] and request.reason == "length"
            assert logprobs.setdefault(i, request.logprobs) == request.logprobs
    whole = torch.tensor([asked[0][0] + expected[0]])
    with torch.no_grad():
        of_all = torch.log_softmax(model(whole)[0].float(), -1)
    n = len(asked[0][0])
    found = [float(of_all[n + t - 1, i]) for t, i in enumerate(expected[0])]
    torch.testing.assert_close(torch.tensor(logprobs[0]), torch.tensor(found), atol=1e-5, rtol=1e-5)


def test_prefixes_are_reused_and_all_pages_return():
    model = new("llama")
    engine = pyllm.Engine(model, num_pages=20)
    prompt = [i % 40 for i in range(200)]
    (first,) = engine.generate([prompt], max_tokens=3)
    assert engine.pool.pages.available == 20
    request = engine.submit(prompt + first.ids, max_tokens=1)
    engine._admit()
    assert request.held.length == 202  # those of the last page that were read are copied
    request.cancel()
    assert request.reason == "cancelled" and engine.pool.pages.available == 20
    assert engine.generate([[1]], max_tokens=1)[0].reason == "length"


@pytest.mark.parametrize("kind", ["lstm", "rwkv"])
def test_recurrent_beginnings_are_reused(kind):
    model = new(kind)
    prompt = [i % 40 for i in range(200)]
    engine, params = pyllm.Engine(model, max_sequences=3, chunk=70), pyllm.SamplingParams(seed=2)
    engine.generate([prompt], params, max_tokens=3)
    for more, length in (([], 140), ([5, 6], 200), ([5, 6, 7], 202)):
        request = engine.submit(prompt + more, params, max_tokens=9)
        engine._admit()
        assert request.held.length == length
        while request.reason is None:
            engine.step()
        assert request.ids == alone(model, prompt + more, params, 9)
        assert len(engine.pool.known) == 3
    engine.generate([[1] * 70], max_tokens=1)
    forgotten = engine.submit(prompt[:150], params)  # three are newer
    engine._admit()
    assert forgotten.held.length == 0
    forgotten.cancel()
    with torch.no_grad():
        model.head.weight.mul_(2)
    again = engine.submit(prompt, params)
    engine.step()  # the model has changed
    assert again.held.length == 70 and len(engine.pool.known) == 1
    assert not pyllm.Engine(model, reuse_prefixes=False).generate([prompt], max_tokens=1)[0]._engine.pool.known


def test_windows_give_pages_back_while_a_sequence_runs():
    engine = pyllm.Engine(new("window"), num_pages=6)
    request = engine.submit([1] * 300, max_tokens=20)
    while not request.ids:
        engine.step()
    assert request.held.pages[:3] == [None] * 3 and engine.pool.pages.available >= 3


@pytest.fixture(scope="module", params=["llama", "lstm"])
def texts(request):
    tokenizer = pyllm.Tokenizer.train("bpe:300", [TEXT])
    return new(request.param, tokenizer.vocab_size), tokenizer


def test_texts_are_those_of_generate_streamed_or_not(texts):
    model, tokenizer = texts
    engine, given = pyllm.Engine(model, tokenizer), ["the quick", "t", "the lazy dog; 古池", ""]
    params = pyllm.SamplingParams(temperature=1.2, seed=7)
    expected = pyllm.generate(model, tokenizer, given, max_tokens=40, temperature=1.2, seed=7)
    assert [r.text for r in engine.generate(given, params, max_tokens=40)] == expected
    assert ["".join(engine.stream(p, params, max_tokens=40)) for p in given] == expected
    stop = expected[0][5:8]
    (stopped,) = engine.generate(given[:1], params, max_tokens=40, stop=stop)
    assert stopped.text == expected[0][: expected[0].index(stop)] and stopped.reason == "stop"
    (by_id,) = engine.generate(given[:1], params, max_tokens=40, stop_ids=stopped.ids[2:3])
    assert by_id.ids == stopped.ids[: stopped.ids.index(stopped.ids[2]) + 1]

    async def together():
        async def one(prompt):
            return "".join([piece async for piece in engine.astream(prompt, params, max_tokens=40)])

        return await asyncio.gather(*map(one, given))

    assert asyncio.run(together()) == expected
    assert not engine._running


def test_leaving_a_stream_ends_its_request(texts):
    engine = pyllm.Engine(*texts)
    stream = engine.stream("the quick brown", pyllm.SamplingParams(seed=1), max_tokens=200)
    next(stream)
    stream.close()
    assert not engine._running


@pytest.mark.parametrize("kind", ["llama", "lstm"])
def test_an_error_ends_one_request_and_leaves_the_others_their_bits(kind):
    model = new(kind)
    params = pyllm.SamplingParams(seed=4)
    expected = alone(model, [5, 6], params, 12)
    nan = pyllm.SamplingParams(logit_bias=torch.full((40,), float("-inf")), seed=1)
    engine = pyllm.Engine(model, max_sequences=8, num_pages=24)

    def fail(i, piece):
        if len(failing.ids) == 3:
            raise RuntimeError("no more")

    good = [engine.submit([5, 6], params, max_tokens=12) for _ in range(2)]
    masked, unknown = engine.submit([1], nan), engine.submit([1, 40], params)
    failing = engine.submit([5, 6], params, max_tokens=12, on_token=fail)
    cancelled = engine.submit([5, 6], params, max_tokens=12)
    other = engine.submit([5], params, max_tokens=12, on_token=lambda i, piece: cancelled.cancel())
    while any(r.reason is None for r in (*good, masked, unknown, failing, cancelled, other)):
        engine.step()
    assert [r.ids for r in good] == [expected] * 2
    assert masked.reason == "error" and "[sample]" in str(masked.error)
    assert isinstance(unknown.error, IndexError) and not unknown.ids
    assert failing.ids == expected[:3] and str(failing.error) == "no more"
    assert cancelled.reason == "cancelled" and cancelled.ids == expected[: len(cancelled.ids)]
    assert not engine._running
    with pytest.raises(IndexError):
        list(engine.stream([40], params))


@pytest.mark.parametrize("kind", ["llama", "lstm"])
def test_an_interrupted_step_loses_nothing(kind, monkeypatch):
    model, params = new(kind), pyllm.SamplingParams(seed=4)
    expected = [alone(model, [5, n], params, 12) for n in range(3)]
    engine = pyllm.Engine(model)
    requests = [engine.submit([5, n], params, max_tokens=12) for n in range(3)]
    for _ in range(6):
        engine.step()
    monkeypatch.setattr(engine.pool, "advance", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.undo()
    while any(r.reason is None for r in requests):
        engine.step()
    assert [r.ids for r in requests] == expected


def test_what_is_too_long_ends_with_a_reason_and_any_budget_for_one_is_enough():
    model, params = new("llama"), pyllm.SamplingParams(seed=0)
    engine = pyllm.Engine(model, num_pages=2)
    asked = [([1] * 100, 29), ([1] * 100, 30), ([2] * 90, 20), ([1] * 390, 11), ([3], 1)]
    found = [engine.submit(prompt, params, max_tokens=n) for prompt, n in asked]
    while any(r.reason is None for r in found):
        engine.step()
    assert [r.reason for r in found] == ["length", "error", "length", "error", "length"]
    assert "100 tokens and 30 more do not fit the engine's pages of 128" in str(found[1].error)
    assert "390 tokens and 11 more do not fit the model's context of 400" in str(found[3].error)
    assert pyllm.Engine(model, max_sequences=2, max_length=10**12).pool.pages.count == 2 * 7


@pytest.mark.parametrize("kind", ["llama", "lstm"])
def test_a_callback_may_cancel_what_has_not_been_read_yet(kind):
    engine = pyllm.Engine(new(kind), num_pages=8)
    first = engine.submit([1, 2], max_tokens=3, on_token=lambda i, piece: second.cancel())
    second = engine.submit([1, 2, 3], max_tokens=3)
    engine.step()
    assert second.reason == "cancelled" and not second.ids
    while first.reason is None:
        engine.step()
    assert first.reason == "length" and not engine._running


def test_the_higher_priority_goes_first():
    engine = pyllm.Engine(new("lstm"), max_sequences=1)
    ended = []
    for name, priority in (("a", 0), ("b", 2), ("c", 2), ("d", 1)):
        engine.submit([1], max_tokens=1, priority=priority, on_token=lambda *_, name=name: ended.append(name))
    for _ in range(4):
        engine.step()
    assert ended == ["b", "c", "d", "a"]


def test_settings_are_checked():
    model = new("llama")
    for name in ("max_sequences", "max_length", "num_pages", "chunk"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, but got 0"):
            pyllm.Engine(model, **{name: 0})
    with pytest.raises(TypeError, match=r"chunk must be a whole number, but got 1\.5"):
        pyllm.Engine(model, chunk=1.5)
    engine = pyllm.Engine(model)
    for error, message, arguments in (
        (TypeError, "must get ids", {"prompt": "text"}),
        (TypeError, "no stop texts", {"prompt": [1], "stop": "x"}),
        (ValueError, "at least one id", {"prompt": []}),
        (ValueError, "max_tokens must be at least 1, but got 0", {"prompt": [1], "max_tokens": 0}),
        (ValueError, "stop text must not be empty", {"prompt": [1], "stop": [""]}),
        (TypeError, "max_tokens must be a whole number, but got 1.5", {"prompt": [1], "max_tokens": 1.5}),
        (TypeError, "n must be a whole number, but got '2'", {"prompt": [1], "n": "2"}),
        (TypeError, "an id must be a whole number, but got 1.5", {"prompt": [1, 1.5]}),
        (TypeError, "a stop id must be a whole number, but got 'a'", {"prompt": [1], "stop_ids": ["a"]}),
        (TypeError, "stop must be a text or several, but got 1", {"prompt": [1], "stop": [1]}),
        (ValueError, "temperature must be", {"prompt": [1], "params": pyllm.SamplingParams(temperature=-1)}),
        (TypeError, "top_k must be an int", {"prompt": [1], "params": pyllm.SamplingParams(top_k=2.5)}),
        (TypeError, "seeds must be an int", {"prompt": [1], "params": pyllm.SamplingParams(seed=0.5)}),
    ):
        with pytest.raises(error, match=message):
            engine.submit(**arguments)
    assert not engine._waiting
    with pytest.raises(ValueError, match="params must be one for all or 2, but got 1"):
        engine.generate([[1], [2]], [pyllm.SamplingParams()])
