from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyllm import nn, ops
from pyllm.models.heads import ACTIVATIONS, HEADS, PROBLEMS, Head, MaskedHead, SequenceHead
from pyllm.models.model import Model, initialise, padding_to_the_right, put_back

POOLINGS = ("mean", "max", "cls", "pooler")
_WHOLE = "an encoder sees the whole of a text at once, and does not generate"


class Block(torch.nn.Module):
    """norm(x + attention(x)), then norm(x + feed_forward(x)), as in the first Transformer (Vaswani et al., 2017,
    https://arxiv.org/abs/1706.03762); each norm takes in the addition before it."""

    def __init__(self, config: dict):
        super().__init__()
        hidden, eps = config["hidden_size"], config["norm_eps"]
        self.attention = nn.Attention(hidden, config["num_heads"], causal=False, qkv_bias=True, bias=True,
                                      dropout=config["attention_dropout"])  # fmt: skip
        self.attention_norm = nn.LayerNorm(hidden, eps)
        self.feed_forward = nn.FeedForward(hidden, config["intermediate_size"], config["activation"], bias=True)
        self.feed_forward_norm = nn.LayerNorm(hidden, eps)
        self.dropout = torch.nn.Dropout(config["dropout"])
        self.attention_output_dropout = torch.nn.Dropout(config["attention_output_dropout"])

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        x, _ = self.attention_norm(self.attention_output_dropout(self.attention(x, lengths=lengths)), x)
        x, _ = self.feed_forward_norm(self.dropout(self.feed_forward(x)), x)
        return x


class Encoder(Model):
    """A BERT (Devlin et al., 2018, https://arxiv.org/abs/1810.04805): a Transformer in which each place sees the whole
    text, with a head for a task, or none: then its hidden vectors are what it gives, and `embed` makes one of a text.

    Args:
        num_segments: how many kinds of ids there are (first text, second text); 0 for no such embedding.
        padding_id: what texts are padded with; of the numerics it is part only with `skip_padding`: places are counted
            without padding, from padding_id + 1 on (RoBERTa).
        pooler: without a head, has a layer for `embed`'s pooling "pooler".
        head: "sequence" (labels of a text), "tokens" (a label for each id), "masked_lm" (ids that were masked), "span"
            (where an answer begins and ends), or None; see `pyllm.models.heads` for what they give and learn from.
        labels: their names, for the first two.
        problem: of "sequence": "single_label_classification", "multi_label_classification" or "regression"; by default
            the targets tell.
        head_activation: "tanh" or "relu", of the layer between a sequence's vector and its labels.
        head_dropout: in the head; as `dropout` by default.
        pooler_dropout: of what the layer between a sequence's vector and its labels reads.
        tie_embeddings: the masked-language head's output layer is the embedding of the ids.
        dropout, attention_output_dropout, attention_dropout: of embeddings and what layers add, of what attention adds
            (as `dropout`), and of attention's weights.
    """

    model_type = "encoder"
    causal = False
    context_length: int
    head: Head | None  # type: ignore[assignment]

    def __init__(self, vocab_size: int, hidden_size: int = 256, num_layers: int = 4, num_heads: int = 4, *,
                 intermediate_size: int | None = None, context_length: int = 512, num_segments: int = 2,
                 padding_id: int = 0, skip_padding: bool = False, activation: str = "gelu", norm_eps: float = 1e-12,
                 pooler: bool = False, head: str | None = None, labels: Sequence[str] | None = None,
                 problem: str | None = None, head_activation: str = "tanh", head_dropout: float | None = None,
                 pooler_dropout: float = 0.0, tie_embeddings: bool = True, dropout: float = 0.0,
                 attention_output_dropout: float | None = None, attention_dropout: float = 0.0):  # fmt: skip
        super().__init__()
        for name, value, known in (("head", head, HEADS), ("problem", problem, PROBLEMS)):
            if value is not None and value not in known:
                raise ValueError(f"{name} must be None or one of {', '.join(known)}, but got {value!r}")
        if head_activation not in ACTIVATIONS:
            raise ValueError(f"head_activation must be one of {', '.join(ACTIVATIONS)}, but got {head_activation!r}")
        if (head in ("sequence", "tokens")) != bool(labels):
            raise ValueError(f"labels must be given for the heads 'sequence' and 'tokens', and only for them, but got "
                             f"{labels!r} for {head!r}")  # fmt: skip
        self.config = {"vocab_size": vocab_size, "hidden_size": hidden_size, "num_layers": num_layers,
                       "num_heads": num_heads, "intermediate_size": intermediate_size or 4 * hidden_size,
                       "context_length": context_length, "num_segments": num_segments, "padding_id": padding_id,
                       "skip_padding": skip_padding, "activation": activation, "norm_eps": norm_eps,
                       "pooler": pooler and head is None, "head": head, "labels": list(labels) if labels else None,
                       "problem": problem, "head_activation": head_activation,
                       "head_dropout": dropout if head_dropout is None else head_dropout,
                       "pooler_dropout": pooler_dropout,
                       "tie_embeddings": tie_embeddings, "dropout": dropout, "attention_dropout": attention_dropout,
                       "attention_output_dropout": dropout if attention_output_dropout is None
                       else attention_output_dropout}  # fmt: skip
        self.context_length = context_length
        places = context_length + (padding_id + 1 if skip_padding else 0)
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.position_embedding = nn.Embedding(places, hidden_size)
        self.segment_embedding = nn.Embedding(num_segments, hidden_size) if num_segments else None
        self.embedding_norm = nn.LayerNorm(hidden_size, norm_eps)
        self.blocks = torch.nn.ModuleList(Block(self.config) for _ in range(num_layers))
        self.pooler = nn.Linear(hidden_size, hidden_size) if self.config["pooler"] else None
        self.head = None if head is None else HEADS[head](self.config)
        self.dropout = torch.nn.Dropout(dropout)
        initialise(self)
        self._tie()

    def _tie(self) -> None:
        if isinstance(self.head, MaskedHead) and self.config["tie_embeddings"]:
            if self.embedding.packed is not None:
                self.head.decoder.quantize_(self.embedding.packed)
            else:
                self.head.decoder.weight = self.embedding.weight

    def with_head(self, head: str | None, labels: Sequence[str] | None = None, *,
                  problem: str | None = None) -> Encoder:  # fmt: skip
        """The same body, not a copy of it, under a new head that has learnt nothing yet: to be trained on another task.

        A pooler becomes the layer below the labels of a sequence, as in BERT. Arguments are the constructor's.
        """
        config = self.config | {"head": head, "labels": labels, "problem": problem, "pooler": False}
        with torch.device("meta"):
            other = type(self)(**config)
        for name, module in self.named_children():
            if name not in ("head", "pooler"):
                setattr(other, name, module)
        if head is not None:
            other.head = HEADS[head](other.config)
            initialise(other.head)
            if isinstance(other.head, SequenceHead) and self.pooler is not None:
                other.head.pooler.load_state_dict(self.pooler.state_dict())
            other.head.to(next(self.parameters()))
            other._tie()
        other.family = self.family
        return other.train(self.training)

    @property
    def vocab_size(self) -> int:
        return self.embedding.num_embeddings

    @property
    def labels(self) -> list[str] | None:
        """What the scores of a "sequence" or "tokens" head are for."""
        return self.config["labels"]

    def hidden(self, ids: Tensor, state: None = None, lengths: Tensor | None = None,
               segments: Tensor | None = None) -> Tensor:  # fmt: skip
        """The vectors (B, T, hidden) of ids (B, T), which may be padded on the right to `lengths` (B,); segments (B, T)
        say which text each id is of, the first if not given."""
        if state is not None:
            raise ValueError(f"state must be None: {_WHOLE}")
        if ids.dim() != 2 or not 0 < ids.shape[1] <= self.context_length:
            raise ValueError(f"ids must have shape (B, T) with T from 1 to {self.context_length}, the model's context, "
                             f"but got {tuple(ids.shape)}")  # fmt: skip
        if lengths is not None and len(lengths) and int(lengths.min()) < 1:
            raise ValueError(f"each sequence must have at least 1 id that is no padding, but got {int(lengths.min())}")
        x = self.embedding(ids)  # (B, T, hidden)
        if self.segment_embedding is not None:
            x = x + self.segment_embedding(torch.zeros_like(ids) if segments is None else segments)
        elif segments is not None:
            raise ValueError("segments must not be given: the model has no embedding for them")
        x, _ = self.embedding_norm(x, self.position_embedding(self._positions(ids)))
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, lengths)
        return x

    def _positions(self, ids: Tensor) -> Tensor:
        if not self.config["skip_padding"]:
            return torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        real = ids != self.config["padding_id"]
        return real.cumsum(1) * real + self.config["padding_id"]

    def forward(self, ids: Tensor, state: None = None, lengths: Tensor | None = None, *,
                attention_mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:  # fmt: skip
        """What the head gives for ids (B, T), or the hidden vectors (B, T, hidden) where there is none.

        Args:
            lengths: (B,): how many ids of each sequence, which is padded on the right, are no padding.
            attention_mask: in place of lengths, (B, T), ones for ids and zeros for padding on either side. Places are
                counted from the first id on, wherever it stands.
            segments: (B, T): 0 for ids of the first text, 1 for those of the second; all 0 by default.

        Raises:
            ValueError, TypeError: a shape, dtype or length that does not fit.
            IndexError: an id or segment outside its embedding.
        """
        h, real = self._placed(ids, state, lengths, attention_mask, segments)
        return h if self.head is None else self.head(h, real)

    def loss(self, ids: Tensor, targets: Tensor, state: None = None, lengths: Tensor | None = None, *,
             attention_mask: Tensor | None = None, segments: Tensor | None = None,
             label_smoothing: float = 0.0) -> Tensor:  # fmt: skip
        """The head's mean loss, over targets as the head takes them. Targets of -100 do not count, nor does padding."""
        if self.head is None:
            raise ValueError("only an encoder with a head has a loss: make one with with_head(...)")
        h, real = self._placed(ids, state, lengths, attention_mask, segments)
        return self.head.loss(h, targets, real, label_smoothing)

    def embed(self, ids: Tensor, lengths: Tensor | None = None, *, attention_mask: Tensor | None = None,
              segments: Tensor | None = None, pooling: str = "mean", normalize: bool = True) -> Tensor:  # fmt: skip
        """One vector a sequence, (B, hidden); the same bits with any padding.

        Args:
            pooling: "mean" or "max" of the hidden vectors, "cls" for the first of them, or "pooler" for what the
                model's own layer, if it has one, makes of that.
            normalize: makes them of length 1.

        The other arguments and the errors are those of `forward`.
        """
        if pooling not in POOLINGS or (pooling == "pooler" and self.pooler is None):
            known = POOLINGS if self.pooler is not None else POOLINGS[:-1]
            raise ValueError(f"pooling must be one of {', '.join(known)}, but got {pooling!r}")
        h, lengths, _ = self._aligned(ids, None, lengths, attention_mask, segments)
        if pooling == "mean":  # attention that likes all places equally: what is padding has no part in any sum
            values = h.unflatten(-1, (self.config["num_heads"], -1))
            nothing = h.new_zeros(1, 1, 1, 1)
            y = ops.attention(nothing.expand(len(h), 1, values.shape[2], 1), nothing.expand(*values.shape[:3], 1),
                              values, key_lengths=lengths).flatten(1)  # fmt: skip
        elif pooling == "max":
            real = None if lengths is None else _first(lengths, h.shape[1])
            y = (h if real is None else h.masked_fill(~real[..., None], float("-inf"))).amax(1)
        else:
            y = h[:, 0] if self.pooler is None or pooling == "cls" else torch.tanh(self.pooler(h[:, 0]))
        if normalize:
            y = ops.rms_norm(y, y.new_full((y.shape[1],), y.shape[1] ** -0.5), eps=1e-24)
        return y

    def _aligned(self, ids, state, lengths, attention_mask, segments) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Hidden vectors with all padding on the right, the lengths, and where the ids were taken from."""
        if attention_mask is None:
            return self.hidden(ids, state, lengths, segments), lengths, None
        if lengths is not None:
            raise ValueError("lengths and attention_mask must not both be given")
        to_right, lengths = padding_to_the_right(ids, attention_mask)
        if segments is not None:
            segments = segments.gather(1, to_right)
        return self.hidden(ids.gather(1, to_right), state, lengths, segments), lengths, to_right

    def _placed(self, ids, state, lengths, attention_mask, segments) -> tuple[Tensor, Tensor | None]:
        """Hidden vectors where their ids are, and which of these are no padding."""
        h, lengths, to_right = self._aligned(ids, state, lengths, attention_mask, segments)
        if to_right is not None:
            return put_back(h, to_right), attention_mask != 0
        return h, None if lengths is None else _first(lengths, h.shape[1])

    def new_state(self, batch_size: int, max_length: int | None = None) -> None:
        raise NotImplementedError(f"there is no state to continue from: {_WHOLE}")


def _first(lengths: Tensor, time: int) -> Tensor:
    return torch.arange(time, device=lengths.device) < lengths[:, None]
