"""Whole models on the kernels: the losses, gradients and ids of the CPU."""

import copy

import pytest
import torch

import pyllm
from pyllm import ops

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
