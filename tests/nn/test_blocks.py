"""The blocks against torch's modules of the same name and state dict."""

import math

import pytest
import torch

from pyllm import nn


def copy_of(ours, theirs):
    theirs.load_state_dict(ours.state_dict())
    return theirs


def same(a, b):
    a, b = (t if isinstance(t, (tuple, list)) else [t] for t in (a, b))
    for x, y in zip(a, b, strict=True):
        if isinstance(x, tuple):
            same(x, y)
        else:
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_linear_embedding_and_norms():
    x = torch.randn(3, 5, 16)
    for ours, theirs in (
        (nn.Linear(16, 9), torch.nn.Linear(16, 9)),
        (nn.LayerNorm(16), torch.nn.LayerNorm(16)),
        (nn.RMSNorm(16), torch.nn.RMSNorm(16, 1e-6)),
    ):
        same(ours(x), copy_of(ours, theirs)(x))
    ours, ids = nn.Embedding(11, 16), torch.randint(11, (3, 5))
    same(ours(ids), copy_of(ours, torch.nn.Embedding(11, 16))(ids))
    with pytest.raises(IndexError):
        ours(torch.tensor([11]))


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_recurrent_layers_load_torch_weights(name, batch_first):
    options = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
    ours, theirs = getattr(nn, name)(7, 6, **options), getattr(torch.nn, name)(7, 6, **options)
    copy_of(ours, theirs)
    x = torch.randn(4, 5, 7)
    a, b = ours(x), theirs(x)
    same(a, b)
    same(ours(x, a[1]), theirs(x, b[1]))


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_cell_steps_equal_the_layer(name):
    layer, cell = getattr(nn, name)(7, 6, batch_first=True), getattr(nn, name + "Cell")(7, 6)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x, state = torch.randn(3, 5, 7), None
    whole, _ = layer(x)
    for t in range(5):
        state = cell(x[:, t], state)
        assert torch.equal(state[0] if name == "LSTM" else state, whole[:, t])


def test_packed_sequences_are_refused():
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(3, 7), torch.randn(2, 7)])
    with pytest.raises(TypeError, match="GRU takes padded sequences and their lengths, but got a PackedSequence"):
        nn.GRU(7, 6)(packed)


def test_dropout_between_layers_follows_the_seed():
    layer, x = nn.LSTM(4, 8, num_layers=2, dropout=0.5, batch_first=True), torch.randn(2, 9, 4)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(layer(x)[0])
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    assert torch.equal(layer.eval()(x)[0], layer(x)[0])


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu", "silu"])
def test_feed_forward(activation):
    block, x = nn.FeedForward(8, 12, activation), torch.randn(2, 3, 8)
    act = {"swiglu": torch.nn.functional.silu, "geglu": torch.nn.functional.gelu}.get(activation)
    if act:
        gate, up = (x @ block.up.weight.T).chunk(2, -1)
        expected = (act(gate) * up) @ block.down.weight.T
    else:
        expected = getattr(torch.nn.functional, activation)(x @ block.up.weight.T) @ block.down.weight.T
    same(block(x), expected)
    with pytest.raises(ValueError, match="activation must be one of swiglu"):
        nn.FeedForward(8, 12, "relu6")


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2}, {"rope_theta": 100.0}, {"window": 3}, {"head_dim": 5}])
def test_attention_with_a_cache_equals_attention_without(options):
    block, x = nn.Attention(16, 4, **options), torch.randn(2, 80, 16)
    with torch.no_grad():
        whole = block(x, torch.arange(80))
        cache = block.new_cache(torch.tensor([[2, 1], [4, 0]], dtype=torch.int32), 5, torch.float32)
        parts = [block(x[:, a:b], torch.arange(a, b).expand(2, -1), cache, torch.tensor([b, b]))
                 for a, b in ((0, 70), (70, 71), (71, 80))]  # fmt: skip
    assert torch.equal(torch.cat(parts, 1), whole)


def test_attention_checks_its_sizes():
    with pytest.raises(ValueError, match="multiple of num_heads, but got 10 and 4"):
        nn.Attention(10, 4)
    with pytest.raises(ValueError, match="multiple of num_kv_heads, but got 4 and 3"):
        nn.Attention(16, 4, 3)
    with pytest.raises(TypeError, match="rope_theta or a cache needs positions"):
        nn.Attention(16, 4, rope_theta=100.0)(torch.randn(1, 2, 16))
    block = nn.Attention(16, 4)
    cache = block.new_cache(nn.own_pages(1, 5), 1, torch.float32)
    with pytest.raises(TypeError, match="a cache needs lengths"):
        block(torch.randn(1, 2, 16), torch.tensor([[0, 1]]), cache)
    with pytest.raises(ValueError, match=r"has no gradients.*torch.no_grad"):
        block(torch.randn(1, 2, 16), torch.tensor([[0, 1]]), cache, torch.tensor([2]))


def test_settings_that_are_refused():
    with pytest.raises(
        ValueError, match="rope_type must be one of linear, dynamic, llama3, yarn, longrope, but got 'su'"
    ):
        nn.rope_frequencies(10000.0, 8, {"rope_type": "su"})
    with pytest.raises(ValueError, match="factor must be a number above 0, but got None"):
        nn.rope_frequencies(10000.0, 8, {"rope_type": "linear"})
    with pytest.raises(ValueError, match="original_max_position_embeddings must be a number above 0, but got -1"):
        nn.rope_frequencies(10000.0, 8, {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": -1})
    with pytest.raises(ValueError, match="active must be from 1 to 4, the number of experts, but got 5"):
        nn.Experts(8, 16, num_experts=4, active=5)


def test_the_weights_of_a_norm_with_an_offset_are_counted_from_it():
    x = torch.randn(3, 16)
    same(nn.RMSNorm(16, offset=1.0)(x), nn.RMSNorm(16)(x))


def test_a_softcapped_head_stays_below_its_cap():
    head = nn.Head(8, 11, softcap=2.0)
    logits = torch.nn.functional.linear(x := 50 * torch.randn(5, 8), head.weight)
    same(head(x), 2.0 * torch.tanh(logits / 2.0))


def test_one_expert_of_one_is_the_feed_forward_layer():
    experts = nn.Experts(8, 16, num_experts=1, active=1)
    x = torch.randn(2, 3, 8)
    same(experts(x), experts.experts[0](x))


def test_attention_that_is_not_causal_sees_the_real_positions_of_its_row_and_adds_a_bias():
    block, x, lengths = nn.Attention(12, 3, causal=False), torch.randn(2, 7, 12), torch.tensor([7, 4])
    bias = torch.randn(3, 7, 7)
    q, k, v = (t.view(2, 7, 3, 4).transpose(1, 2) for t in block.qkv(x).chunk(3, -1))
    for added in (None, bias):
        mask = torch.where(torch.arange(7) < lengths[:, None], 0.0, -torch.inf)[:, None, None]
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask if added is None else mask + added)
        found = block(x, lengths=lengths, bias=added)
        same(found, block.out(y.transpose(1, 2).flatten(2)))
        assert torch.equal(found[1:, :4], block(x[1:, :4], bias=None if added is None else added[:, :4, :4]))
    with pytest.raises(ValueError, match="alibi must be with causal=True"):
        nn.Attention(12, 3, causal=False, alibi=True)


def test_cross_attention():
    block, x, source = nn.CrossAttention(12, 3, bias=True), torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    lengths = torch.tensor([7, 4])
    found = block(x, *block.keys_and_values(source), lengths)
    (k, v), q = block.kv(source).chunk(2, -1), block.query(x)
    q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in (q, k, v))
    mask = (torch.arange(7) < lengths[:, None])[:, None, None]
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    same(found, block.out(y.transpose(1, 2).flatten(2)))
    assert torch.equal(found[1:], block(x[1:], *block.keys_and_values(source[1:, :4])))


@pytest.mark.parametrize("causal", [True, False])
def test_relative_bias_has_the_buckets_of_t5(causal):
    from transformers.models.t5.modeling_t5 import T5Attention

    for buckets, farthest in ((32, 128), (8, 20)):
        block, positions = nn.RelativeBias(3, buckets, farthest, causal=causal), torch.arange(300)
        distances = positions - positions[:, None]
        known = T5Attention._relative_position_bucket(distances, not causal, buckets, farthest)
        expected = block.weight[known].permute(2, 0, 1)
        if causal:
            expected = expected.tril()
        found = block(positions)[0]
        assert torch.equal(found.tril() if causal else found, expected)
        apart = torch.tensor([[3, 4], [7, 8]])
        assert torch.equal(block(apart)[1, :, 0], found[:, 7, :9]) and torch.equal(
            block(apart[:1])[0], found[:, 3:5, :5]
        )
    with pytest.raises(ValueError, match="num_buckets must be 4 or more"):
        nn.RelativeBias(3, 2, 20, causal=False)
    with pytest.raises(ValueError, match="at most 65536, but got 32 and 70000"):
        nn.RelativeBias(3, 32, 70000, causal=causal)


def test_sinusoidal_embedding():
    for size in (8, 7):
        block = nn.SinusoidalEmbedding(300, size)
        first, later = block(torch.arange(5)), block(torch.tensor([[200, 3]]))
        assert torch.equal(later[0, 1], first[3]) and torch.equal(
            nn.SinusoidalEmbedding(201, size)(torch.tensor(200)), later[0, 0]
        )
        for i in range(size):
            j = i if i < (size + 1) // 2 else i - (size + 1) // 2
            expected = [(math.sin if j == i else math.cos)(p / 10000 ** (2 * j / size)) for p in range(5)]
            same(first[:, i], torch.tensor(expected))
