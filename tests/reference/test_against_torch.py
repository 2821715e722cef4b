"""The twins against torch, in float64, where torch has the same operation."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pyllm import reference


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_norms():
    x, w, b = randn(3, 4, 7), randn(7), randn(7)
    same(reference.layer_norm(x, w, b), F.layer_norm(x, (7,), w, b))
    same(reference.rms_norm(x, w), F.rms_norm(x, (7,), w, eps=1e-6))


def test_activations():
    x, y = randn(5, 9) * 4, randn(5, 9)
    for approximate in ("none", "tanh"):
        same(reference.gelu(x, approximate=approximate), F.gelu(x, approximate=approximate))
        same(reference.geglu(x, y, approximate=approximate), F.gelu(x, approximate=approximate) * y)
    same(reference.silu(x), F.silu(x))
    same(reference.swiglu(x, y), F.silu(x) * y)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(reduction, smoothing):
    x, w, b, t = randn(6, 5), randn(11, 5), randn(11), torch.tensor([0, 10, -100, 3, -100, 7])
    expected = F.cross_entropy(F.linear(x, w, b), t, label_smoothing=smoothing, reduction=reduction)
    options = {"label_smoothing": smoothing, "reduction": reduction}
    same(reference.cross_entropy(F.linear(x, w, b), t, **options), expected)
    same(reference.linear_cross_entropy(x, w, t, b, **options), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention(causal, kv_heads):
    q, k, v = randn(2, 6, 4, 8), randn(2, 6, kv_heads, 8), randn(2, 6, kv_heads, 8)
    expected = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=causal, enable_gqa=True
    )
    same(reference.attention(q, k, v, causal=causal), expected.transpose(1, 2))


def test_attention_masks_and_empty_rows():
    q, k, v = randn(2, 3, 1, 4), randn(2, 5, 1, 4), randn(2, 5, 1, 4)
    out, weights = reference.attention(q, k, v, causal=True, key_lengths=torch.tensor([5, 2]), return_weights=True)
    visible = (weights[:, 0] > 0).int().tolist()
    assert visible[0] == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert visible[1] == [[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert (out[1, 0] == 0).all()
    _, weights = reference.attention(q, k, v, causal=True, window=2, return_weights=True)
    assert (weights[0, 0] > 0).sum(-1).tolist() == [2, 2, 2]


@pytest.mark.parametrize("name", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent(name, bidirectional):
    kind = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[name]
    model = kind(5, 6, num_layers=2, bidirectional=bidirectional, batch_first=True, dtype=torch.float64)
    x, lengths = randn(4, 7, 5), torch.tensor([3, 7, 1, 5])
    options = {"num_layers": 2, "bidirectional": bidirectional}
    params = list(model.parameters())
    for a, b in zip(flat(getattr(reference, name)(x, params, **options)), flat(model(x)), strict=True):
        same(a, b)
    packed, state = model(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    expected = [pad_packed_sequence(packed, batch_first=True)[0], *flat(state)]
    for a, b in zip(flat(getattr(reference, name)(x, params, lengths=lengths, **options)), expected, strict=True):
        same(a, b)


def flat(t):
    return [t] if isinstance(t, torch.Tensor) else [u for part in t for u in flat(part)]


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_keeps_lengths_and_relative_positions(interleaved):
    q, k = randn(1, 1, 1, 8), randn(1, 1, 1, 8)
    options = {"interleaved": interleaved, "inv_freq": 0.5 ** torch.arange(4)}  # whose angles float32 holds exactly

    def score(i, j):
        a = reference.rope(q, torch.tensor([i]), **options)
        b = reference.rope(k, torch.tensor([j]), **options)
        same(a.norm(), q.norm())
        return (a * b).sum()

    same(score(3, 1), score(1003, 1001))
    assert not torch.isclose(score(3, 1), score(3, 2))
