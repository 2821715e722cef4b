from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyllm import nn, ops


class Model(torch.nn.Module):
    """What every model here answers to, whether it trains, generates or is served.

    A model of your own gives `model_type`, `config` (the constructor's arguments, as plain numbers and strings), `head`
    (the layer from hidden vectors to logits), `hidden` and `new_state`.
    """

    model_type: ClassVar[str]
    config: dict[str, Any]
    context_length: int | None = None  # None: no limit
    family: str | None = None  # the model_type of the Hugging Face checkpoint that it was loaded from
    unheeded: Mapping[str, Any] = {}  # what its checkpoint asks for that generating does not do: beams and the like
    answers: ClassVar[bool] = False  # prompts are sources that get an answer, not texts that are gone on with
    start_ids: tuple[int, ...] = ()  # that an answer begins with, before what is generated
    stop_ids: frozenset[int] = frozenset()  # that end what is generated, beside those of the tokenizer
    silent_ids: frozenset[int] = frozenset()  # that have no place in a text that was generated
    causal: ClassVar[bool] = True  # a place sees only those before it, so that a text may come in pieces
    exporter: ClassVar[Callable[..., None]]  # `pyllm.export`: set by its room, which lies above this one
    quantizer: ClassVar[Callable[..., Any]]  # `pyllm.quantize`, in the same way
    head: torch.nn.Linear

    def hidden(self, ids: Tensor, state=None, lengths: Tensor | None = None) -> Tensor:
        """The vectors that the head turns into logits, (B, T, hidden), of ids (B, T).

        With a state, ids continue what it has seen, and it advances in place. `lengths` (B,) says how many of the T ids
        are real where the sequences are padded on the right.
        """
        raise NotImplementedError

    def new_state(self, batch_size: int, max_length: int | None = None):
        """An empty state for `batch_size` sequences of at most `max_length` tokens."""
        raise NotImplementedError

    def forward(self, ids: Tensor, state=None, lengths: Tensor | None = None, *,
                attention_mask: Tensor | None = None) -> Tensor:  # fmt: skip
        """Logits (B, T, vocabulary); arguments as in `hidden`.

        In place of lengths, `attention_mask` (B, T) has ones for real ids and zeros for padding on either side, where
        logits mean nothing.
        """
        if attention_mask is None:
            return self.head(self.hidden(ids, state, lengths))
        if lengths is not None:
            raise ValueError("lengths and attention_mask must not both be given")
        to_right, lengths = padding_to_the_right(ids, attention_mask)
        return self.head(put_back(self.hidden(ids.gather(1, to_right), state, lengths), to_right))

    def loss(self, ids: Tensor, targets: Tensor, state=None, *, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy a token, in nats. Targets of -100 do not count. Unless they are softcapped, or the head is
        quantised, the logits are never held whole."""
        h = self.hidden(ids, state)
        return token_loss(self.head, h.flatten(0, 1), targets.flatten(), label_smoothing)

    def begin(self, ids: Tensor, lengths: Tensor, max_tokens: int) -> tuple[Any, Tensor, Tensor]:
        """How generating begins, from prompts (B, T), of `lengths` (B,): a state with room for `max_tokens` more, and
        what it reads first, with its lengths."""
        return self.new_state(len(ids), ids.shape[1] + max_tokens), ids, lengths

    def room(self, length: int) -> int | None:
        """How many tokens can be generated from a prompt of `length`; None: no limit."""
        return None if self.context_length is None else self.context_length - length

    def constrain(self, logits: Tensor, step: int, max_tokens: int) -> Tensor:
        """The logits (B, vocabulary) that the step-th of at most `max_tokens` tokens is drawn from."""
        return logits

    def save(self, path: str | os.PathLike, tokenizer: Any = None, *, gguf: bool = False, **options: Any) -> None:
        """Writes a Hugging Face folder, or a GGUF file, and compares what comes back: `pyllm.export(model, ...)`."""
        self.exporter(path, tokenizer, gguf=gguf, **options)

    def quantize(self, weights: str, **options: Any) -> Any:
        """Quantises the linear and recurrent layers in place: `pyllm.quantize(model, weights, ...)`."""
        return self.quantizer(weights, **options)

    @property
    def vocab_size(self) -> int:
        return self.head.out_features

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes with."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters()) + sum(math.prod(w.shape) for w in self.quantized_weights())

    def num_bytes(self) -> int:
        """Of the parameters and quantised weights."""
        return sum(p.nbytes for p in self.parameters()) + sum(w.nbytes for w in self.quantized_weights())

    def quantized_weights(self) -> list[ops.PackedQuantizedWeight]:
        """Each once, though layers share it."""
        found = (w for m in self.modules() if isinstance(m, nn.Quantizable) for w in m.quantized.values())
        return list({id(packed): packed for packed in found}.values())


def token_loss(layer: torch.nn.Linear, h: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Mean cross-entropy of the logits that a layer makes of h (N, hidden). They are held whole only where the layer is
    more than a product with a weight."""
    if layer.weight is None or getattr(layer, "softcap", None) is not None:
        return ops.cross_entropy(layer(h), targets, label_smoothing=label_smoothing)
    return ops.linear_cross_entropy(h, layer.weight, targets, layer.bias, label_smoothing=label_smoothing)


def initialise(module: torch.nn.Module, additions: int | None = None) -> None:
    """Draws the weights of all linear layers and embeddings anew, as GPT and BERT do; biases are zeros. With
    `additions`, what is added to the stream, so many times, starts smaller, as in GPT-2."""
    for part in module.modules():
        if isinstance(part, torch.nn.Linear | torch.nn.Embedding):
            torch.nn.init.normal_(part.weight, std=0.02)
        if isinstance(part, torch.nn.Linear) and part.bias is not None:
            torch.nn.init.zeros_(part.bias)
    if additions is not None:
        for name, weight in module.named_parameters():
            if name.endswith(("attention.out.weight", "down.weight")):
                torch.nn.init.normal_(weight, std=0.02 * additions**-0.5)


def padding_to_the_right(ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(which of its ids each sequence starts with, and goes on with, how many of them are real)."""
    if attention_mask.shape != ids.shape:
        raise ValueError(f"attention_mask must have shape {tuple(ids.shape)}, but got {tuple(attention_mask.shape)}")
    real, places = attention_mask != 0, torch.arange(ids.shape[1], device=ids.device)
    lengths, first = real.sum(1), real.int().argmax(1)
    if not torch.equal(real, (places >= first[:, None]) & (places < (first + lengths)[:, None])):
        raise ValueError("attention_mask must have each sequence's ones next to each other")
    return (places + first[:, None]) % ids.shape[1], lengths


def put_back(h: Tensor, to_right: Tensor) -> Tensor:
    """Vectors (B, T, hidden) where their ids were before `padding_to_the_right`."""
    return h.gather(1, to_right.argsort(1)[..., None].expand(h.shape))
