"""A whole step of training the recurrent language model with Adam: three times the operations of its forward pass.

torch's column is the same model of torch.nn's modules, under the usual cross-entropy of all logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pyllm.benchmarks.timing import Case, Providers
from pyllm.models import LanguageModel

OPS = ("training_step",)
GATES = {"rnn": 1, "gru": 3, "lstm": 4}
SIZES = {  # (vocabulary, hidden, layers, batch, time)
    "tiny": [(11, 8, 2, 3, 5)],
    "small": [],
    "usual": [(10_000, 256, 2, 32, 64)],
    "full": [(10_000, 256, 2, 32, 64)],
}


class _Torch(torch.nn.Module):
    def __init__(self, vocabulary: int, hidden: int, layers: int, cell: str):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, hidden)
        self.rnn = getattr(torch.nn, cell.upper())(hidden, hidden, layers, batch_first=True)
        self.head = torch.nn.Linear(hidden, vocabulary)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.rnn(self.embedding(ids))[0]).flatten(0, 1), targets.flatten())


def cases(sizes: str) -> Iterator[Case]:
    for cell in GATES:
        for size in SIZES[sizes]:
            yield _step(cell, *size)


def _step(cell: str, vocabulary: int, hidden: int, layers: int, batch: int, time: int) -> Case:
    def setup() -> Providers:
        ours, theirs = LanguageModel(vocabulary, hidden, layers, cell=cell), _Torch(vocabulary, hidden, layers, cell)
        theirs.load_state_dict(ours.state_dict())
        ids, targets = torch.randint(vocabulary, (2, batch, time))
        return {"pyllm": _trainer(ours, ids, targets), "torch": _trainer(theirs, ids, targets)}

    products = layers * GATES[cell] * 2 * hidden**2 + hidden * vocabulary
    name = f"{cell}, {vocabulary} tokens, {layers} layers of {hidden}, {batch} x {time} fp32"
    return Case("training_step", name, setup, mode="forward+backward", flops=6 * batch * time * products)


def _trainer(model: LanguageModel | _Torch, ids: Tensor, targets: Tensor) -> Callable[[], Tensor]:
    optimizer = torch.optim.Adam(model.parameters())

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = model.loss(ids, targets)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
