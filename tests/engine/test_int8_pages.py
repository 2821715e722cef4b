"""Keys and values in 8 bits. That they have the same bits among any others is in trials.py."""

import pytest
import torch
from engine.test_sources import new as new_answerer
from engine.trials import int8_state, make

import pyllm
from pyllm.nn.state import PAGE_SIZE


@torch.no_grad()
def test_they_are_near_those_in_full():
    model, ids = make("llama"), [i * 7 % 40 for i in range(200)]
    plain, int8 = (pyllm.Engine(model, kv_cache_dtype=dtype).score([ids])[0] for dtype in ("auto", "int8"))
    off = (plain.logprobs - int8.logprobs).abs()
    assert 0 < off.max() < 0.3 and off.mean() < 0.03
    whole = model(torch.tensor([ids]), int8_state(model, 200))[0].log_softmax(-1)
    torch.testing.assert_close(whole[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0], int8.logprobs)


def test_answers_are_the_same_alone_and_among_others():
    model = new_answerer("t5")
    sources = [[8 + i * k % 23 for i in range(n)] for k, n in ((3, 5), (5, 130), (7, 64), (3, 5))]
    params = pyllm.SamplingParams(temperature=0.8, seed=3)

    def answered(sources, **options):
        engine = pyllm.Engine(model, kv_cache_dtype="int8", num_pages=30, **options)
        found = [(r.ids, r.logprobs) for r in engine.generate(sources, params, max_tokens=20)]
        assert engine.pool.pages.available == 30
        return found

    together = answered(sources, max_sequences=3)
    assert [answered([source], chunk=7)[0] for source in sources] == together
    plain = pyllm.Engine(model, num_pages=30).generate(sources, params, max_tokens=20)
    assert [r.logprobs for r in plain] != [logprobs for _, logprobs in together]


def test_the_budget_in_bytes():
    model = make("llama")
    sizes = {}
    for dtype in ("auto", "int8"):
        pool = pyllm.Engine(model, kv_cache_dtype=dtype, kv_cache_memory_bytes=10**6).pool
        held = [t for c in pool.caches for t in (c.keys, c.values)]
        sizes[dtype], one = sum(t.nbytes for t in held), sum(t[0].nbytes for t in held)
        assert 10**6 - one < sizes[dtype] <= 10**6
        assert pool.most == (10**6 // one - 1) * PAGE_SIZE
        assert one == 2 * 2 * PAGE_SIZE * 2 * (8 * 4 if dtype == "auto" else 8 + 2)  # of head sizes of 8
    with pytest.raises(ValueError, match=f"kv_cache_memory_bytes must be at least {2 * one}, but got {one}"):
        pyllm.Engine(model, kv_cache_dtype="int8", kv_cache_memory_bytes=one)
    request = pyllm.Engine(model, kv_cache_dtype="int8", kv_cache_memory_bytes=2 * one).generate([[1] * 60])[0]
    assert request.reason == "error" and "the engine's pages of 64" in str(request.error)


def test_what_does_not_fit_is_refused():
    model = make("llama")
    with pytest.raises(ValueError, match="kv_cache_dtype must be 'auto' or 'int8', but got 'int4'"):
        pyllm.Engine(model, kv_cache_dtype="int4")
    with pytest.raises(ValueError, match="num_pages and kv_cache_memory_bytes must not both be given"):
        pyllm.Engine(model, num_pages=3, kv_cache_memory_bytes=10**6)
    with pytest.raises(ValueError, match="kv_cache_memory_bytes must be at least 1, but got 0"):
        pyllm.Engine(model, kv_cache_memory_bytes=0)
    for given in ({"kv_cache_dtype": "int8"}, {"kv_cache_memory_bytes": 10**6}):
        with pytest.raises(TypeError, match="must be for a model with attention"):
            pyllm.Engine(make("lstm"), **given)
