"""What encoders say of texts. Each head turns hidden vectors (B, T, hidden) into scores and has its loss; `real` (B, T)
is true where they are of ids and not of padding, or None where all are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyllm import nn, ops
from pyllm.models.model import token_loss

IGNORED = -100  # a target that does not count, as in torch
ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")


class Head(torch.nn.Module):
    """What the heads have in common; `config` is the encoder's."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()

    def forward(self, h: Tensor, real: Tensor | None) -> Tensor:
        raise NotImplementedError

    def loss(self, h: Tensor, targets: Tensor, real: Tensor | None, label_smoothing: float) -> Tensor:
        """The mean over the targets that count."""
        raise NotImplementedError


class SequenceHead(Head):
    """One score a label for each sequence, (B, labels), from its first vector."""

    def __init__(self, config: dict[str, Any]):
        super().__init__(config)
        self.labels, self.problem = len(config["labels"]), config["problem"]
        self.pooler_dropout = torch.nn.Dropout(config["pooler_dropout"])
        self.pooler = nn.Linear(config["hidden_size"], config["hidden_size"])
        self.activation = ACTIVATIONS[config["head_activation"]]
        self.dropout = torch.nn.Dropout(config["head_dropout"])
        self.classifier = nn.Linear(config["hidden_size"], self.labels)

    def forward(self, h: Tensor, real: Tensor | None) -> Tensor:
        first = h[:, 0] if real is None else h[torch.arange(len(h), device=h.device), real.int().argmax(1)]
        first = self.activation(self.pooler(self.pooler_dropout(first)))
        return self.classifier(self.dropout(first))

    def loss(self, h: Tensor, targets: Tensor, real: Tensor | None, label_smoothing: float) -> Tensor:
        """Targets are (B,) labels, for one label a sequence; (B, labels) of zeros and ones, for several; or numbers,
        (B, labels) or for one alone (B,): the problem, or else the targets' dtype and number say which."""
        scores, problem = self(h, real), self.problem
        if problem is None:
            whole = not targets.is_floating_point()
            problem = PROBLEMS[2] if self.labels == 1 else PROBLEMS[0] if whole else PROBLEMS[1]
        if problem == "single_label_classification":
            return ops.cross_entropy(scores, targets, label_smoothing=label_smoothing)
        if label_smoothing:
            raise ValueError(f"label_smoothing must be 0 for {problem}, but got {label_smoothing}")
        if problem == "regression" and self.labels == 1 and targets.dim() == 1:
            targets = targets[:, None]
        if targets.shape != scores.shape:
            shapes = f"{tuple(scores.shape)}, but got {tuple(targets.shape)}"
            raise ValueError(f"targets of {problem} must have shape {shapes}")
        scores, targets = scores.float(), targets.float()
        if problem == "regression":
            return torch.nn.functional.mse_loss(scores, targets)
        return torch.nn.functional.binary_cross_entropy_with_logits(scores, targets)


class TokenHead(Head):
    """One score a label for each id, (B, T, labels)."""

    def __init__(self, config: dict[str, Any]):
        super().__init__(config)
        self.dropout = torch.nn.Dropout(config["head_dropout"])
        self.tagger = nn.Linear(config["hidden_size"], len(config["labels"]))

    def forward(self, h: Tensor, real: Tensor | None) -> Tensor:
        return self.tagger(self.dropout(h))

    def loss(self, h: Tensor, targets: Tensor, real: Tensor | None, label_smoothing: float) -> Tensor:
        """Targets are labels (B, T)."""
        h, targets = _counted(h, targets, real)
        return ops.cross_entropy(self(h, None), targets, label_smoothing=label_smoothing)


class MaskedHead(Head):
    """One score for each id of the vocabulary that could stand at each place, (B, T, vocabulary)."""

    def __init__(self, config: dict[str, Any]):
        super().__init__(config)
        self.activation = nn.feed_forward.PLAIN[config["activation"]]
        self.transform = nn.Linear(config["hidden_size"], config["hidden_size"])
        self.norm = nn.LayerNorm(config["hidden_size"], config["norm_eps"])
        self.decoder = nn.Linear(config["hidden_size"], config["vocab_size"])

    def forward(self, h: Tensor, real: Tensor | None) -> Tensor:
        return self.decoder(self._transformed(h))

    def loss(self, h: Tensor, targets: Tensor, real: Tensor | None, label_smoothing: float) -> Tensor:
        """Targets are ids (B, T). Nothing is computed for places that do not count; no logits are held whole."""
        h, targets = _counted(h, targets, real)
        return token_loss(self.decoder, self._transformed(h), targets, label_smoothing)

    def _transformed(self, h: Tensor) -> Tensor:
        return self.norm(self.activation(self.transform(h)))


class SpanHead(Head):
    """How well an answer could begin, and end, at each place, (B, T, 2): -infinity at padding."""

    def __init__(self, config: dict[str, Any]):
        super().__init__(config)
        self.dropout = torch.nn.Dropout(config["head_dropout"])
        self.span = nn.Linear(config["hidden_size"], 2)

    def forward(self, h: Tensor, real: Tensor | None) -> Tensor:
        scores = self.span(self.dropout(h))
        return scores if real is None else scores.masked_fill(~real[..., None], float("-inf"))

    def loss(self, h: Tensor, targets: Tensor, real: Tensor | None, label_smoothing: float) -> Tensor:
        """Targets are (B, 2), the first and the last place of the answer. The loss is the mean of those of both."""
        if targets.shape != (len(h), 2):
            raise ValueError(f"targets must have shape {(len(h), 2)}, but got {tuple(targets.shape)}")
        if label_smoothing:
            raise ValueError(f"label_smoothing must be 0 for spans, but got {label_smoothing}")
        begin, end = (ops.cross_entropy(s, t) for s, t in zip(self(h, real).unbind(2), targets.unbind(1), strict=True))
        return (begin + end) / 2


HEADS: dict[str, type[Head]] = {
    "sequence": SequenceHead, "tokens": TokenHead, "masked_lm": MaskedHead, "span": SpanHead,
}  # fmt: skip


def _counted(h: Tensor, targets: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """The vectors (N, hidden) and targets (N,) that count."""
    if targets.shape != h.shape[:2]:
        raise ValueError(f"targets must have shape {tuple(h.shape[:2])}, but got {tuple(targets.shape)}")
    counts = targets != IGNORED
    if real is not None:
        counts = counts & real
    return h[counts], targets[counts]
