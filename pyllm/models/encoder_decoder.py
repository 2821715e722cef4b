from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor

from pyllm import nn
from pyllm.models.model import Model, initialise, padding_to_the_right
from pyllm.nn import KeyValueCache, SourceState
from pyllm.nn.norm import NORMS


class Pair(NamedTuple):
    """A batch for an encoder-decoder: `source` (B, S), of whose ids the first `lengths` (B,), or all, are real, and
    `ids` (B, T), which the decoder reads."""

    source: Tensor
    ids: Tensor
    lengths: Tensor | None = None


Attended = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # a source's keys, values, lengths and page table


class Memory(NamedTuple):
    """What an encoder makes of sources: vectors (B, S, hidden), of which the first `lengths` (B,), or all, are real."""

    hidden: Tensor
    lengths: Tensor | None = None


class Block(torch.nn.Module):
    """Self-attention, in a decoder attention to the source, and a feed-forward layer: what each gives is added to the
    stream. Each reads the stream normalised or, with post_norm, the stream is normalised after each addition."""

    adds_later = True  # gives what is still to be added to the stream, and the stream so far

    def __init__(self, config: dict, decoder: bool):
        super().__init__()
        norm = partial(NORMS[config["norm"]], eps=config["norm_eps"])
        side = "" if decoder else "encoder_"
        hidden, heads, bias = config["hidden_size"], config[f"{side}num_heads"], config["bias"]
        self.post_norm, scale = config["post_norm"], config["attention_scale"]
        self.attention = nn.Attention(hidden, heads, head_dim=config["head_dim"], causal=decoder, scale=scale,
                                      qkv_bias=bias, bias=bias, dropout=config["attention_dropout"])  # fmt: skip
        self.attention_norm = norm(hidden)
        if decoder:
            self.cross_attention = nn.CrossAttention(hidden, heads, config["head_dim"], scale=scale, bias=bias,
                                                      dropout=config["attention_dropout"])  # fmt: skip
            self.cross_attention_norm = norm(hidden)
        self.feed_forward = nn.FeedForward(hidden, config[f"{side}intermediate_size"], config["activation"], bias=bias,
                                           dropout=config["activation_dropout"])  # fmt: skip
        self.feed_forward_norm = norm(hidden)
        self.dropout = torch.nn.Dropout(config["dropout"])

    def forward(self, delta: Tensor | None, x: Tensor, positions: Tensor, cache: KeyValueCache | None = None,
                lengths: Tensor | None = None, bias: Tensor | None = None,
                source: Attended | None = None) -> tuple[Tensor | None, Tensor]:  # fmt: skip
        """x: the stream so far, and delta what is still to be added to it, if anything; returns the next such pair.
        source: what the cross-attention sees; the rest is as in `nn.Attention`."""
        layers: list = [(self.attention_norm, lambda y: self.attention(y, positions, cache, lengths, bias))]
        if source is not None:
            layers.append((self.cross_attention_norm, lambda y: self.cross_attention(y, *source)))
        layers.append((self.feed_forward_norm, self.feed_forward))
        for norm, layer in layers:
            if self.post_norm:
                delta, x = None, norm(self.dropout(layer(x)), x)[0]
            else:
                y, x = (norm(x), x) if delta is None else norm(delta, x)
                delta = self.dropout(layer(y))
        return delta, x


class Side(torch.nn.Module):
    """The encoder or the decoder: positions, blocks, and a norm after the last of them if there is none within."""

    def __init__(self, config: dict, decoder: bool):
        super().__init__()
        hidden, side, position = config["hidden_size"], "" if decoder else "encoder_", config["position"]
        norm = partial(NORMS[config["norm"]], eps=config["norm_eps"])
        self.offset = config["position_offset"]
        self.position_embedding: torch.nn.Module | None = None
        self.relative_bias = None
        if position == "learned":
            self.position_embedding = nn.Embedding(config["context_length"] + self.offset, hidden)
        elif position == "sinusoidal":
            self.position_embedding = nn.SinusoidalEmbedding(config["context_length"] + self.offset, hidden)
        else:
            self.relative_bias = nn.RelativeBias(config[f"{side}num_heads"], config["num_buckets"],
                                                 config["max_distance"], causal=decoder)  # fmt: skip
        self.embedding_norm = norm(hidden) if config["embedding_norm"] else None
        self.blocks = torch.nn.ModuleList(Block(config, decoder) for _ in range(config[f"{side}num_layers"]))
        self.norm = None if config["post_norm"] else norm(hidden)
        self.dropout = torch.nn.Dropout(config["dropout"])

    def forward(self, x: Tensor, positions: Tensor, lengths: Tensor | None = None,
                caches: Sequence[KeyValueCache] | None = None,
                sources: Sequence[Attended] | None = None) -> Tensor:  # fmt: skip
        """Embedded ids (B, T, hidden) and their positions, (T,) or (B, T) -> (B, T, hidden)."""
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions + self.offset).to(x.dtype)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        keys = None if caches is None else caches[0].capacity
        bias = None if self.relative_bias is None else self.relative_bias(positions, keys)
        x, delta = self.dropout(x), None
        for i, block in enumerate(self.blocks):
            cache, source = (None if each is None else each[i] for each in (caches, sources))
            delta, x = block(delta, x, positions, cache, lengths, bias, source)
        if self.norm is None:
            return x
        return self.dropout(self.norm(x) if delta is None else self.norm(delta, x)[0])


class EncoderDecoder(Model):
    """A Transformer that answers one sequence, the source, with another (Vaswani et al., 2017,
    https://arxiv.org/abs/1706.03762), by default as in T5 1.1 (relative positions, RMS norm before each layer, GEGLU);
    `position="learned", context_length=1024, norm="layer_norm", post_norm=True, embedding_norm=True, activation="gelu",
    bias=True` make it BART.

        logits = model(Pair(source, ids))                        # (B, S) and (B, T) -> (B, T, vocabulary)
        loss = model.loss(model.pair(source, targets), targets)  # targets of -100 do not count

        state = model.new_state(B, max_length, model.encode(source))
        logits = model(ids, state)                               # as ids come

    Args:
        encoder_num_layers, encoder_num_heads, encoder_intermediate_size: the decoder's, unless given.
        head_dim: of queries, keys and values; hidden_size / num_heads by default.
        context_length: how long source and target may be; only relative positions can do without a limit.
        position: "relative", a bias of attention's scores by distance, in `num_buckets` up to `max_distance` (see
            `nn.RelativeBias`); "learned", or "sinusoidal".
        position_offset: the row of the learned positions that the first one has.
        attention_scale: see `ops.attention`; 1 / sqrt(head_dim) by default.
        norm: "rms_norm", "layer_norm", or "one_plus_rms_norm"; `post_norm` puts it after each addition to the stream.
        embedding_scale, embedding_norm: embeddings are multiplied, and, with their positions, normalised.
        output_scale: what the head reads is multiplied.
        tie_embeddings, head_bias: the head has the embedding's weights, and a bias.
        pad_id, start_id: what stands for no id, and what the decoder reads first, by default the same.
        eos_ids: ids that end an answer.
        forced_bos_id, forced_eos_id: ids that generating always begins with, and ends with where it has to stop.
        suppressed_ids: ids that are never generated.
        dropout, attention_dropout, activation_dropout: of embeddings and what layers add, of attention's weights, and
            within feed-forward layers.
    """

    model_type = "encoder_decoder"
    answers = True

    def __init__(self, vocab_size: int, hidden_size: int = 256, num_layers: int = 4, num_heads: int = 4, *,
                 encoder_num_layers: int | None = None, encoder_num_heads: int | None = None,
                 head_dim: int | None = None, intermediate_size: int | None = None,
                 encoder_intermediate_size: int | None = None, context_length: int | None = None,
                 position: str = "relative", position_offset: int = 0, num_buckets: int = 32, max_distance: int = 128,
                 attention_scale: float | None = None, norm: str = "rms_norm", norm_eps: float = 1e-6,
                 post_norm: bool = False, activation: str = "geglu_tanh", bias: bool = False,
                 embedding_scale: float | None = None, embedding_norm: bool = False,
                 output_scale: float | None = None, tie_embeddings: bool = True, head_bias: bool = False,
                 pad_id: int = 0, start_id: int | None = None, eos_ids: Sequence[int] = (),
                 forced_bos_id: int | None = None, forced_eos_id: int | None = None,
                 suppressed_ids: Sequence[int] = (), dropout: float = 0.0, attention_dropout: float = 0.0,
                 activation_dropout: float = 0.0):  # fmt: skip
        super().__init__()
        if position not in ("relative", "learned", "sinusoidal"):
            raise ValueError(f"position must be 'relative', 'learned' or 'sinusoidal', but got {position!r}")
        if position != "relative" and context_length is None:
            raise ValueError(f"context_length must be given with position={position!r}")
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, but got {norm!r}")
        start_id = pad_id if start_id is None else start_id
        for i in (pad_id, start_id, forced_bos_id, forced_eos_id, *eos_ids, *suppressed_ids):
            if i is not None and not 0 <= i < vocab_size:
                raise ValueError(f"ids must be in [0, {vocab_size}), but got {i}")
        if intermediate_size is None:
            intermediate_size = nn.feed_forward.usual_size(hidden_size, activation)
        self.config = {"vocab_size": vocab_size, "hidden_size": hidden_size, "num_layers": num_layers,
                       "num_heads": num_heads, "encoder_num_layers": encoder_num_layers or num_layers,
                       "encoder_num_heads": encoder_num_heads or num_heads, "head_dim": head_dim,
                       "intermediate_size": intermediate_size,
                       "encoder_intermediate_size": encoder_intermediate_size or intermediate_size,
                       "context_length": context_length, "position": position, "position_offset": position_offset,
                       "num_buckets": num_buckets, "max_distance": max_distance, "attention_scale": attention_scale,
                       "norm": norm, "norm_eps": norm_eps, "post_norm": post_norm, "activation": activation,
                       "bias": bias, "embedding_scale": embedding_scale, "embedding_norm": embedding_norm,
                       "output_scale": output_scale, "tie_embeddings": tie_embeddings, "head_bias": head_bias,
                       "pad_id": pad_id, "start_id": start_id, "eos_ids": list(eos_ids),
                       "forced_bos_id": forced_bos_id, "forced_eos_id": forced_eos_id,
                       "suppressed_ids": list(suppressed_ids), "dropout": dropout,
                       "attention_dropout": attention_dropout, "activation_dropout": activation_dropout}  # fmt: skip
        self.context_length = context_length
        self.start_ids, self.stop_ids = (start_id,), frozenset(eos_ids)
        self.silent_ids = frozenset(i for i in (pad_id, start_id, forced_bos_id, *eos_ids) if i is not None)
        self.embedding_scale, self.output_scale = embedding_scale, output_scale
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.encoder, self.decoder = Side(self.config, False), Side(self.config, True)
        self.head = nn.Head(hidden_size, vocab_size, bias=head_bias)
        initialise(self, 3 * num_layers)
        if tie_embeddings:
            self.head.weight = self.embedding.weight

    def pair(self, source: Tensor, targets: Tensor, lengths: Tensor | None = None) -> Pair:
        """The batch that predicts targets (B, T): the decoder reads them one place later, behind the start id."""
        ids = targets.roll(1, 1)
        ids[:, :1] = self.config["start_id"]
        return Pair(source, ids.masked_fill(ids == -100, self.config["pad_id"]), lengths)

    def encode(self, source: Tensor, lengths: Tensor | None = None) -> Memory:
        """What the decoder sees of sources (B, S), padded on the right beyond `lengths` (B,)."""
        self._check_fits(source.shape[1])
        positions = torch.arange(source.shape[1], device=source.device)
        return Memory(self.encoder(self._embedded(source), positions, lengths), lengths)

    def forward(self, ids: Tensor | Pair, state: SourceState | None = None, lengths: Tensor | None = None, *,
                attention_mask: Tensor | None = None) -> Tensor:  # fmt: skip
        """As in `Model.forward`; of a pair, `attention_mask` (B, S) is the source's."""
        if not isinstance(ids, Pair):
            return super().forward(ids, state, lengths, attention_mask=attention_mask)
        if attention_mask is not None:
            if ids.lengths is not None:
                raise ValueError("a pair's lengths and attention_mask must not both be given")
            to_right, real = padding_to_the_right(ids.source, attention_mask)
            ids = Pair(ids.source.gather(1, to_right), ids.ids, real)
        return self.head(self.hidden(ids, state, lengths))

    def hidden(self, ids: Tensor | Pair, state: SourceState | None = None, lengths: Tensor | None = None) -> Tensor:
        """As in `Model.hidden`: ids alone continue a state, which has the source; without one they come in a `Pair`."""
        self._check_fits((ids.ids if isinstance(ids, Pair) else ids).shape[1])
        if isinstance(ids, Pair) and state is None:
            memory = self.encode(ids.source, ids.lengths)
            ids, sources = ids.ids, self._sources(memory)
            source_lengths, source_table = memory.lengths, None
            positions, total = torch.arange(ids.shape[1], device=ids.device), None
        elif isinstance(ids, Tensor) and state is not None:
            sources, source_lengths, source_table = state.sources, state.source_lengths, state.source_table
            positions, total = state.positions(ids.shape[1])
        else:
            wanted = "a Pair of source and ids" if state is None else "ids alone, as the state has the source"
            raise TypeError(f"an encoder-decoder must get {wanted}, but got a {type(ids).__name__}")
        h = self.decoder(self._embedded(ids), positions, total, None if state is None else state.caches,
                         [(k, v, source_lengths, source_table) for k, v in sources])  # fmt: skip
        if state is not None:
            state.advance(ids.shape[1] if lengths is None else lengths)
        return h if self.output_scale is None else h * self.output_scale

    def new_state(self, batch_size: int, max_length: int | None = None, memory: Memory | None = None) -> SourceState:
        """A state for answers, of at most `max_length` ids, to the `batch_size` sources of a memory."""
        if memory is None or len(memory.hidden) != batch_size:
            found = "none" if memory is None else f"that of {len(memory.hidden)}"
            raise ValueError(f"an encoder-decoder's state must get the memory of its {batch_size} sources, but got "
                             f"{found}: model.new_state({batch_size}, max_length, model.encode(source))")  # fmt: skip
        limits = [n for n in (max_length, self.context_length) if n is not None]
        if not limits:
            raise ValueError("max_length must be given, as the model's context has no limit")
        blocks = cast(Iterable[Block], self.decoder.blocks)
        table = nn.own_pages(batch_size, min(limits), self.device)
        caches = [block.attention.new_cache(table, table.numel(), self.dtype) for block in blocks]
        return SourceState(caches, min(limits), self._sources(memory), memory.lengths)

    def begin(self, ids: Tensor, lengths: Tensor, max_tokens: int) -> tuple[SourceState, Tensor, Tensor]:
        first = torch.tensor([self.start_ids] * len(ids), dtype=torch.int64, device=ids.device)
        return self.new_state(len(ids), max_tokens, self.encode(ids, lengths)), first, torch.ones_like(lengths)

    def room(self, length: int) -> int | None:
        return self.context_length if self.context_length is None or length <= self.context_length else 0

    def constrain(self, logits: Tensor, step: int, max_tokens: int) -> Tensor:
        forced = self.config["forced_bos_id"] if step == 0 else None
        if step + 1 == max_tokens and self.config["forced_eos_id"] is not None:
            forced = self.config["forced_eos_id"]
        if forced is not None:
            return torch.full_like(logits, -torch.inf).index_fill(1, torch.tensor([forced], device=logits.device), 0)
        never = torch.tensor(self.config["suppressed_ids"], dtype=torch.int64, device=logits.device)
        return logits.index_fill(1, never, -torch.inf) if len(never) else logits

    def _embedded(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return x if self.embedding_scale is None else x * torch.tensor(self.embedding_scale, dtype=x.dtype)

    def _sources(self, memory: Memory) -> list[tuple[Tensor, Tensor]]:
        blocks = cast(Iterable[Block], self.decoder.blocks)
        return [block.cross_attention.keys_and_values(memory.hidden) for block in blocks]

    def _check_fits(self, count: int) -> None:
        if self.context_length is not None and self.context_length < count:
            raise ValueError(f"the model's context is {self.context_length} tokens, but got {count} ids")
