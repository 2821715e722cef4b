"""A small checkpoint whose every tensor tells which one it is."""

import torch

from pyllm.checkpoint import save_checkpoint
from pyllm.text import Tokenizer

TOKENIZER = Tokenizer.train("char", "the cat sat on the mat")
CONFIG = {"hidden_size": 8, "dropout": 0.1, "cell": "lstm", "layers": [1, 2, {"tied": True}], "scale": None}


def weights(value=1.0):
    return {"embedding.weight": torch.full((5, 8), value), "head.bias": torch.full((7,), value, dtype=torch.bfloat16)}


def save(folder, value=1.0, **changes):
    arguments = {"model_type": "rnn", "config": CONFIG, "weights": weights(value), "tokenizer": TOKENIZER,
                 "training": {"step": int(value), "state": torch.full((9,), value)}}  # fmt: skip
    return save_checkpoint(folder, **(arguments | changes))


def check(checkpoint, value=1.0):
    assert checkpoint.model_type == "rnn" and checkpoint.config == CONFIG
    assert checkpoint.tokenizer.to_json() == TOKENIZER.to_json()
    assert checkpoint.weights.keys() == weights().keys()
    for name, tensor in weights(float(value)).items():
        assert checkpoint.weights[name].dtype == tensor.dtype and torch.equal(checkpoint.weights[name], tensor)
    assert checkpoint.training["step"] == int(value)
    assert torch.equal(checkpoint.training["state"], torch.full((9,), float(value)))
