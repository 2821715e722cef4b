"""Every operation once, at the sizes of a small model in training: 2,048 tokens, width 256."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from pyllm import ops, reference
from pyllm.benchmarks.timing import Case, modes

ROWS, WIDTH, VOCABULARY, HEADS, TIME = 2048, 256, 1024, 4, 128


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(ROWS, WIDTH), torch.randn(WIDTH), torch.randn(WIDTH)
    batch = ROWS // TIME
    heads = [torch.randn(batch, TIME, HEADS, WIDTH // HEADS) for _ in range(3)]
    ids, positions = torch.randint(VOCABULARY, (ROWS,)), torch.arange(TIME)
    table = torch.randn(VOCABULARY, WIDTH)
    wide = torch.randn(ROWS, 4 * WIDTH)

    def torch_attention(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def torch_rope(x):
        angle = positions[:, None, None] * 10000 ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1])
        a, b = x.chunk(2, -1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    def both(name: str, theirs: Callable, *tensors: torch.Tensor, **options) -> Iterator[Case]:
        functions: dict[str, Callable] = {
            "pyllm": lambda *t: getattr(ops, name)(*t, **options),
            "torch": theirs,
            "reference": lambda *t: getattr(reference, name)(*t, **options),
        }
        size = " x ".join(map(str, tensors[0].shape))
        yield from modes(name, size, functions, tensors, backward=2, measure=("forward+backward",))

    yield from both("attention", torch_attention, *heads, causal=True)
    yield from both("layer_norm", lambda x, w, b: F.layer_norm(x, (WIDTH,), w, b), x, weight, bias)
    yield from both("rms_norm", lambda x, w: F.rms_norm(x, (WIDTH,), w, 1e-6), x, weight)
    yield from both("linear", F.linear, x, torch.randn(3 * WIDTH, WIDTH))
    yield from both("embedding", lambda i, w: F.embedding(i, w), ids, table)
    yield from both("rope", lambda x, p: torch_rope(x), heads[0], positions)
    yield from both("gelu", F.gelu, wide)
    yield from both("swiglu", lambda g, u: F.silu(g) * u, *wide.chunk(2, -1))
    yield from both("cross_entropy", lambda x, t: F.cross_entropy(x, t), torch.randn(ROWS, VOCABULARY), ids)
    yield from both("linear_cross_entropy", lambda x, w, t: F.cross_entropy(F.linear(x, w), t), x, table, ids)
    sequences = torch.randn(batch, TIME, WIDTH)
    for name, module in (("rnn", torch.nn.RNN), ("gru", torch.nn.GRU), ("lstm", torch.nn.LSTM)):
        layer = module(WIDTH, WIDTH, batch_first=True)
        parameters = [p.detach() for p in layer.parameters()]
        functions: dict[str, Callable] = {
            "pyllm": lambda x, *p, name=name: getattr(ops, name)(x, p)[0],
            "torch": lambda x, *p, layer=layer: torch.func.functional_call(
                layer, dict(zip(dict(layer.named_parameters()), p, strict=True)), x
            )[0],
            "reference": lambda x, *p, name=name: getattr(reference, name)(x, p)[0],
        }
        size = f"{batch} x {TIME} x {WIDTH}"
        yield from modes(name, size, functions, [sequences, *parameters], backward=2, measure=("forward+backward",))
    logits = torch.randn(1, VOCABULARY)
    settings = {"seeds": 1, "positions": 7, "temperature": 0.8, "top_k": 50, "top_p": 0.9}

    def torch_sample():
        p, i = (logits / 0.8).softmax(-1).topk(50)
        return i.gather(1, torch.multinomial(p.masked_fill(p.cumsum(-1) - p >= 0.9, 0), 1))

    calls: dict[str, Callable] = {
        "pyllm": lambda: ops.sample(logits, **settings),
        "torch": torch_sample,
        "reference": lambda: reference.sample(logits, **settings),
    }
    yield Case("sample", f"1 x {VOCABULARY}", calls)
