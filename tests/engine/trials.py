"""The numerics contract of an engine, by random trials.

    python tests/engine/trials.py --trials 1000

In each, a needle runs among random neighbours: any model, arrival order, chunk size, budget, prefix that is known or
not, number of threads, recorded or not, step by step or in bursts, speculative or not, with samples, cancellations,
other settings. What it draws and the log-probabilities must have the bits of one full forward pass over its text, and
all pages must come back.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter

import torch

import pyllm
from pyllm import _C, ops
from pyllm.nn.state import PAGE_SIZE, AttentionState, own_pages

VOCAB = 40
DECODERS = {
    "llama": {"num_kv_heads": 2},
    "window": {"window": 70, "head_norm": True},
    "alibi": {"position": "alibi", "norm": "layer_norm"},
    "learned": {"position": "learned", "norm": "layer_norm", "activation": "gelu", "qkv_bias": True, "bias": True},
    "experts": {"num_experts": 4, "logit_softcap": 5.0},
}
KINDS = [*DECODERS, "bf16", "int8", "int4", "int8 keys", "lstm", "gru", "rwkv"]


def make(kind: str) -> pyllm.models.Model:
    torch.manual_seed(3)
    if kind in ("lstm", "gru"):
        return pyllm.LanguageModel(VOCAB, 32, 2, cell=kind).eval()
    if kind == "rwkv":
        model = pyllm.RWKV(VOCAB, 32, 2, head_dim=8, decay_rank=4, rate_rank=5, value_rank=3, gate_rank=6).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        return model
    heads = 2 if kind == "int8 keys" else 4  # of 16, for products of whole numbers
    model = pyllm.Decoder(VOCAB, 32, 2, heads, intermediate_size=64, context_length=320,
                          **DECODERS.get(kind, {})).eval()  # fmt: skip
    with torch.no_grad():
        model.embedding.weight.mul_(20)
    if kind in ("int8", "int4"):
        model.quantize(kind)
    return model.to(torch.bfloat16) if kind == "bf16" else model


def settings(rng: random.Random) -> pyllm.SamplingParams:
    given = {"temperature": rng.choice([0.0, 0.4, 1.0, 1.3]), "seed": rng.randrange(1000)}
    more = [{}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.05}, {"typical_p": 0.8}, {"repetition_penalty": 1.2},
            {"frequency_penalty": 0.2, "presence_penalty": 0.1}, {"allowed_ids": range(0, VOCAB, 3)},
            {"logit_bias": torch.linspace(-1, 1, VOCAB)}]  # fmt: skip
    return pyllm.SamplingParams(**given, **rng.choice(more))


def prompt(rng: random.Random, shared: list[int]) -> list[int]:
    ids = shared[: rng.choice([0, 0, 5, 70, 130])] + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 30))]
    return ids * rng.choice([1, 1, 2]) if len(ids) < 40 else ids


def int8_state(model, length: int) -> AttentionState:
    """That of a sequence whose keys and values are kept in 8 bits."""
    table = own_pages(1, length)
    caches = [block.attention.new_cache(table, table.numel(), torch.int8) for block in model.blocks]
    return AttentionState(caches, table.numel() * PAGE_SIZE)


@torch.no_grad()
def expected(model, kind: str, ids: list[int], drawn: list[int], params: pyllm.SamplingParams):
    """What is drawn after each of the prompt's continuations, from one pass over all of the text."""
    n, count = len(ids), len(drawn)
    whole = torch.tensor(ids + drawn)
    logits = model(whole[None, :-1], int8_state(model, n + count) if kind == "int8 keys" else None)[0, n - 1 :]
    history = whole[:-1].repeat(count, 1)
    history.masked_fill_(torch.arange(n + count - 1) >= torch.arange(n, n + count)[:, None], -1)
    given = {name: getattr(params, name) for name in ("temperature", "top_k", "top_p", "min_p", "typical_p",
             "repetition_penalty", "frequency_penalty", "presence_penalty")}  # fmt: skip
    return ops.sample(logits, seeds=params.seed, positions=torch.arange(n, n + count), history=history,
                      logit_bias=params.bias(VOCAB), **given)  # fmt: skip


def trial(model, kind: str, seed: int, most: int = 63) -> Counter[str]:
    """Runs one; raises AssertionError where a bit differs. Says what it had."""
    rng, had = random.Random(seed), Counter()
    shared = [rng.randrange(VOCAB) for _ in range(130)]
    asked = []
    for i in range(1 + rng.choice([1, 2, 3, 5, 8, rng.randrange(1, most + 1)])):
        options = {"max_tokens": rng.randrange(1, 16), "priority": rng.randrange(2), "n": rng.choice([1, 1, 1, 3])}
        asked.append((prompt(rng, shared), settings(rng), options | ({"n": 1} if i == 0 else {})))
    recurrent = kind in ("lstm", "gru", "rwkv")
    least = max(-(-(len(ids) + o["max_tokens"] - 1) // PAGE_SIZE) for ids, _, o in asked)
    speculate = None if recurrent else rng.choice([None, "lookup", model])
    engine = pyllm.Engine(model, max_sequences=rng.choice([1, 2, 7, 64]), chunk=rng.choice([1, 7, 64, 100, 400]),
                          num_pages=rng.choice([least, least + 3, 4 * least, 200]), reuse_prefixes=rng.random() < 0.7,
                          speculate=speculate, kv_cache_dtype="int8" if kind == "int8 keys" else "auto")  # fmt: skip
    if speculate is not None:  # as if it were free, so that much is proposed
        engine._speculation.fixed = engine._speculation.row_cost = engine._speculation.proposer.cost = 0.0
    engine.steps.recordable = seed // len(KINDS) % 3 > 0
    threads = _C.num_threads()
    _C.set_num_threads(rng.choice([1, 2]))
    try:
        order = rng.sample(range(len(asked)), len(asked))
        made, hurry = {}, rng.choice([0, 0, 1, 5])
        for i in order:
            ids, params, options = asked[i]
            made[i] = engine.submit(ids, params, **options)
            for _ in range(rng.randrange(hurry + 1)):
                engine.step(rng.choice((0.0, 60.0)))
                if i and rng.random() < 0.1:
                    made[i].cancel()
        limit = 10_000
        while any(r.reason is None for first in made.values() for r in first.samples):
            engine.step(rng.choice((0.0, 60.0)))
            limit -= 1
            assert limit, "a deadlock"
        for i in (0, rng.choice(order)):
            for request in made[i].samples:
                if request.ids:
                    found = expected(model, kind, asked[i][0], request.ids, request.params)
                    assert found.ids.tolist() == request.ids, (kind, seed, "ids")
                    assert found.logprobs.tolist() == request.logprobs, (kind, seed, "log-probabilities")
                    assert found.processed_logprobs.tolist() == request.processed_logprobs, (kind, seed, "processed")
        needle = made[0]
        assert needle.reason == "length" and len(needle.ids) == asked[0][2]["max_tokens"], (kind, seed, needle.reason)
    finally:
        _C.set_num_threads(threads)
    if recurrent:
        assert engine.pool.free == engine.max_sequences, (kind, seed)
    else:
        assert engine.pool.pages.available == engine.pool.pages.count, (kind, seed)
    had[kind] += 1
    had["recorded"] += bool(engine.steps.recorded)
    had["speculative"] += speculate is not None
    had["neighbours"] += len(asked) - 1
    return had


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the seed of the first")
    options = parser.parse_args()
    models, had = {kind: make(kind) for kind in KINDS}, Counter()
    for seed in range(options.first, options.first + options.trials):
        kind = KINDS[seed % len(KINDS)]
        had += trial(models[kind], kind, seed)
        if (seed + 1) % 100 == 0:
            print(f"{seed + 1 - options.first} trials, no bit that differs", flush=True)
    print(", ".join(f"{name}: {count}" for name, count in had.items()))


if __name__ == "__main__":
    main()
