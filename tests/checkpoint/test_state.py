import random

import numpy as np
import pytest
import torch
from torch import nn

from pyllm.checkpoint import (
    load_checkpoint,
    optimizer_tensors,
    random_state,
    restore_optimizer,
    restore_random_state,
    save_checkpoint,
)


def model_of(dtype=torch.float32, width=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(10, width), nn.LSTM(width, 6, batch_first=True)).to(dtype)


def train(model, optimizer, steps):
    for i in range(steps):
        ids = torch.full((2, 3), i % 10)

        def loss(ids=ids):
            optimizer.zero_grad()
            loss = model(ids)[0].float().square().mean()
            loss.backward()
            return loss

        optimizer.step(loss)


def through_a_file(folder, model, optimizer):
    save_checkpoint(folder, model_type="m", config={}, weights=model.state_dict(),
                    training={"optimizer": optimizer_tensors(optimizer, model)})  # fmt: skip
    return load_checkpoint(folder)


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.987654321), amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1 / 3),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), foreach=False),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    "groups": lambda p: torch.optim.AdamW([{"params": (p := list(p))[:1], "lr": 0.3}, {"params": p[1:]}], lr=0.01),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_goes_on_as_if_never_stopped(tmp_path, kind, dtype):
    make = OPTIMIZERS[kind]
    model = model_of(dtype)
    optimizer = make(model.parameters())
    train(model, optimizer, 3)
    optimizer.param_groups[0]["initial_lr"] = 0.7
    saved = through_a_file(tmp_path, model, optimizer)

    other = model_of(dtype)
    other.load_state_dict(saved.weights)
    restored = make(other.parameters())
    restore_optimizer(restored, other, saved.training["optimizer"])
    ours, theirs = restored.state_dict(), optimizer.state_dict()
    assert repr(ours["param_groups"]) == repr(theirs["param_groups"])
    assert repr(ours["state"]) == repr(theirs["state"])
    train(model, optimizer, 3)
    train(other, restored, 3)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_state_finer_than_its_parameters_is_kept(tmp_path):
    model = model_of(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    exact = torch.randn(10, 4)
    optimizer.state[model[0].weight]["momentum_buffer"] = exact
    saved = through_a_file(tmp_path, model, optimizer).training["optimizer"]
    assert torch.equal(saved["state"]["0.weight"]["momentum_buffer"], exact)
    restore_optimizer(optimizer, model, saved)
    restored = optimizer.state[model[0].weight]["momentum_buffer"]
    assert restored.dtype == torch.float32 and torch.equal(restored, exact)
    assert restored.data_ptr() != saved["state"]["0.weight"]["momentum_buffer"].data_ptr()


def test_another_optimizer_is_an_error():
    model = model_of()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 2)
    saved = optimizer_tensors(optimizer, model)
    wide, more = model_of(width=5), nn.Sequential(*model, nn.Linear(2, 2))
    for other, owner, message in [
        (torch.optim.SGD(model.parameters()), model, "the optimizer must be the saved 'Adam', but got 'SGD'"),
        (OPTIMIZERS["groups"](model.parameters()), model, "must be the saved 'Adam', but got 'AdamW'"),
        (torch.optim.Adam([{"params": [p]} for p in model.parameters()]), model, "must be the saved 1, but got 5"),
        (
            torch.optim.Adam(wide.parameters()),
            wide,
            r"\('0\.weight', \[10, 4\]\), but got \('0\.weight', \[10, 5\]\)",
        ),
        (torch.optim.Adam(more.parameters()), more, r"must be the saved None, but got \('2\.weight', \[2, 2\]\)"),
        (
            torch.optim.Adam(list(model.parameters())[:-1]),
            model,
            r"saved \('1\.bias_hh_l0', \[24\]\), but got None",
        ),
        (torch.optim.Adam(wide.parameters()), model, r"its parameters must be the model's, but one of shape \(10, 5\)"),
    ]:
        before = repr(other.state_dict())
        with pytest.raises(ValueError, match=message):
            restore_optimizer(other, owner, saved)
        assert repr(other.state_dict()) == before
    with pytest.raises(ValueError, match=r"saved has a state for 'x', which is in no group"):
        restore_optimizer(optimizer, model, saved | {"state": {"x": {}}})
    with pytest.raises(ValueError, match=r"its parameters must be the model's, but one of shape \(10, 4\) is not"):
        optimizer_tensors(optimizer, model[1])


def test_tied_parameters_have_one_state(tmp_path):
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
    model["head"].weight = model["embedding"].weight
    optimizer = torch.optim.Adam(model.parameters())
    model["head"](model["embedding"](torch.arange(5))).sum().backward()
    optimizer.step()
    saved = through_a_file(tmp_path, model, optimizer).training["optimizer"]
    assert saved["state"].keys() == {"embedding.weight", "head.bias"}
    restore_optimizer(optimizer, model, saved)


def test_random_generators_go_on(tmp_path):
    def draw():
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()]

    draw()
    save_checkpoint(tmp_path, model_type="m", config={}, weights={}, training={"random": random_state()})
    expected = [draw(), draw()]
    restore_random_state(load_checkpoint(tmp_path).training["random"])
    assert [draw(), draw()] == expected
