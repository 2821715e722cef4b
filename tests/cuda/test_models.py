"""Whole models on the kernels: the losses, gradients and ids of the CPU."""

import copy

import pytest
import torch

import pyllm
from pyllm import ops
from pyllm.data import SequenceLoader
from pyllm.engine import generate_ids
from pyllm.engine.capture import Captured
from pyllm.engine.recording import NotRecordable
from pyllm.training import AdamW
from pyllm.training import train as train_model

OPTIONS = {
    "rope": {"num_kv_heads": 2, "window": 12},
    "learned": {"position": "learned", "norm": "layer_norm", "activation": "gelu"},
    "alibi": {"position": "alibi"},
}


def train(model, ids):
    loss = ops.cross_entropy(model(ids), ids)
    loss.backward()
    return [loss.detach().cpu(), *(p.grad.cpu() for p in model.parameters())]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_training_step(options, device, on_cpu):
    model = pyllm.Decoder(60, 32, 2, 4, context_length=64, **options)
    ids = torch.randint(0, 60, (3, 20))
    expected = on_cpu(lambda: train(copy.deepcopy(model), ids))
    for ours, theirs in zip(train(model.to(device), ids.to(device)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    pyllm.synchronize()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@torch.no_grad()
def test_steps_with_a_state(options, device, on_cpu):
    model = pyllm.Decoder(60, 32, 2, 4, context_length=64, **options).eval()
    ids = torch.randint(0, 60, (2, 24))
    expected = on_cpu(lambda: copy.deepcopy(model)(ids))
    model, ids = model.to(device), ids.to(device)
    state = model.new_state(2, 64)
    steps = [model(part, state=state) for part in ids.split([9, 1, 1, 12, 1], 1)]
    torch.testing.assert_close(torch.cat(steps, 1).cpu(), expected, rtol=1e-4, atol=1e-5)
    pyllm.synchronize()


def recurrent(cell):
    if cell == "rwkv":
        return pyllm.RWKV(60, 32, 2, head_dim=16)
    return pyllm.LanguageModel(60, 24, 2, cell=cell, embedding_size=20)


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm", "rwkv"])
def test_a_recurrent_model(cell, device, on_cpu):
    model, ids = recurrent(cell), torch.randint(0, 60, (3, 9))
    expected = on_cpu(lambda: train(copy.deepcopy(model), ids))
    whole = on_cpu(lambda: model.eval()(ids).detach())
    model, ids = model.to(device), ids.to(device)
    for ours, theirs in zip(train(model, ids), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    state = model.new_state(3)
    with torch.no_grad():
        steps = [model(part, state=state) for part in ids.split([4, 1, 1, 3], 1)]
    torch.testing.assert_close(torch.cat(steps, 1).cpu(), whole, rtol=1e-4, atol=1e-5)
    pyllm.synchronize()


def served(kind):
    if kind in ("lstm", "rwkv"):
        return recurrent(kind)
    if kind == "answers":
        return pyllm.EncoderDecoder(60, 32, 2, 4, context_length=64, position="sinusoidal")
    experts = {"num_experts": 4} if kind == "experts" else {}
    return pyllm.Decoder(60, 32, 2, 4, context_length=64, **OPTIONS["rope"], **experts)


@pytest.mark.parametrize("kind", ["decoder", "experts", "answers", "lstm", "rwkv"])
def test_an_engine_and_the_plain_loop(kind, device, on_cpu):
    """With ids that are cut off at the first whose probabilities are within rounding of a border: none here."""
    prompts, params = [[1, 2, 3], [4] * 9, [7]], [pyllm.SamplingParams(seed=i, top_p=0.9) for i in range(3)]

    def run(model):
        engine = pyllm.Engine(model, max_sequences=2, max_length=32, chunk=5)
        drawn = [r.ids for r in engine.generate(prompts, params, max_tokens=5)]
        sources = [[5, 6]] if model.answers else None
        scored = engine.score([[1, 2, 3, 4, 5]], sources=sources)[0].logprobs
        return drawn, list(generate_ids(model, prompts, params[0], max_tokens=4)), scored

    model = served(kind).eval()
    expected, found = on_cpu(lambda: run(copy.deepcopy(model))), run(model.to(device))
    assert found[:2] == expected[:2]
    torch.testing.assert_close(found[2], expected[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", ["int8", "int4-min"])
def test_a_quantised_model(weights, device, on_cpu):
    model = pyllm.Decoder(60, 32, 2, 4, context_length=64, tie_embeddings=True).eval()
    model.quantize(weights)
    ids = torch.randint(0, 60, (3, 7))
    with torch.no_grad():
        expected = on_cpu(lambda: copy.deepcopy(model)(ids))
        moved = model.to(device)
        for layer in moved.modules() if device.type == "cpu" else ():
            if isinstance(layer, pyllm.nn.Quantizable) and layer.packed is not None:  # as the kernels read it
                panels, packed = layer.packed._panels_of(8), layer.packed
                layer.quantized = {"weight": ops.PackedQuantizedWeight(panels, *packed.layout, packed.shape)}
        torch.testing.assert_close(moved(ids.to(device)).cpu(), expected, rtol=1e-3, atol=1e-4)


def test_training(device, on_cpu, tmp_path):
    """With batches that are on the CPU, clipping, and a stop in between."""
    ids = torch.randint(0, 60, (400,))

    def run(model, where, **options):
        optimizer = AdamW(model.parameters(), 0.01)
        return train_model(model, SequenceLoader(ids, 3, 12), optimizer, folder=where, progress=False,
                           validation=SequenceLoader(ids[:60], 2, 12), **options)  # fmt: skip

    model = pyllm.Decoder(60, 32, 2, 4, context_length=64)
    expected = on_cpu(lambda: run(copy.deepcopy(model), tmp_path / "cpu", steps=6))
    run(copy.deepcopy(model).to(device), tmp_path / "device", steps=3)
    found = run(model.to(device), tmp_path / "device", steps=6, resume=True)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-4, atol=1e-5)
    assert found.validation[-1][1].loss == pytest.approx(expected.validation[-1][1].loss, rel=1e-4)
    pyllm.synchronize()


def test_what_the_device_finds_is_raised_where_it_belongs(device):
    """And not by the next call, which may be someone else's, or never come."""
    model = pyllm.Decoder(60, 32, 2, 4, context_length=64).to(device).eval()
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"\[sample\] logits must be finite or -infinity"):
        list(generate_ids(model, [[1, 2]], max_tokens=1))
    with pytest.raises(ValueError, match=r"\[sample\] logits must be finite or -infinity"):
        pyllm.Engine(model, max_length=32).score([[1, 2, 3]])
    pyllm.synchronize()


def test_a_wrong_target_is_not_said_to_be_a_learning_rate(device):
    model = pyllm.Decoder(60, 32, 2, 4, context_length=64).to(device)
    batch = torch.randint(0, 60, (2, 12)), torch.full((2, 12), 60)
    with pytest.raises(IndexError, match=r"targets must be in \[0, 60\), but got 60"):
        train_model(model, [batch], AdamW(model.parameters(), 0.01), ops.cross_entropy, progress=False)
    pyllm.synchronize()


def on_each_gpu(device):
    if device.type != "cuda":
        pytest.skip("needs CUDA graphs")
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]


@torch.no_grad()
def test_a_step_is_captured_on_the_device_of_its_tensors(device):
    """Also where that is not the current one: capturing computes nothing, and a replay does."""
    for gpu in on_each_gpu(device):
        x = torch.randn(3, 8, device=gpu)
        ops.gelu(x)
        captured = Captured(lambda x=x: ops.gelu(x), [], gpu)
        for _ in range(2):
            x.normal_()
            captured.run()
            assert torch.equal(captured.out, ops.gelu(x))
        pyllm.synchronize(gpu.index)


@torch.no_grad()
def test_a_capture_that_fails_leaves_all_as_it_was(device):
    for gpu in on_each_gpu(device):
        x = torch.randn(3, 8, device=gpu)
        expected, before = ops.gelu(x), torch.cuda.current_stream(gpu)
        for step in (lambda x=x: ops.gelu(x * x.sum().item()),
                     lambda x=x: ops.sample(x, seeds=1, positions=1).ids):  # fmt: skip
            with pytest.raises(NotRecordable):
                Captured(step, [], gpu)
            assert torch.cuda.current_stream(gpu) == before
        assert torch.equal(ops.gelu(x), expected)
        assert Captured(lambda x=x: ops.gelu(x), [], gpu).out.shape == x.shape
        pyllm.synchronize(gpu.index)
