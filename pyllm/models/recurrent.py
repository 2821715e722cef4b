from __future__ import annotations

import torch
from torch import Tensor

from pyllm import nn
from pyllm.models.model import Model
from pyllm.nn import RecurrentState

CELLS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


class LanguageModel(Model):
    """The recurrent language model: embedding, recurrent layers, linear (Mikolov et al., 2010)."""

    model_type = "recurrent"

    def __init__(self, vocab_size: int, hidden_size: int = 256, num_layers: int = 2, dropout: float = 0.0,
                 cell: str = "lstm", embedding_size: int | None = None):  # fmt: skip
        super().__init__()
        if cell not in CELLS:
            raise ValueError(f"cell must be one of {', '.join(CELLS)}, but got {cell!r}")
        embedding_size = embedding_size or hidden_size
        self.config = {"vocab_size": vocab_size, "hidden_size": hidden_size, "num_layers": num_layers,
                       "dropout": dropout, "cell": cell, "embedding_size": embedding_size}  # fmt: skip
        self.embedding = nn.Embedding(vocab_size, embedding_size)
        self.rnn = CELLS[cell](embedding_size, hidden_size, num_layers, batch_first=True,
                               dropout=dropout if num_layers > 1 else 0.0)  # fmt: skip
        self.dropout = torch.nn.Dropout(dropout)
        self.head = nn.Linear(hidden_size, vocab_size)
        torch.nn.init.normal_(self.embedding.weight, std=embedding_size**-0.5)

    def hidden(self, ids: Tensor, state: RecurrentState | None = None, lengths: Tensor | None = None) -> Tensor:
        x = self.dropout(self.embedding(ids))  # (B, T, embedding)
        vectors = None
        if state is not None:
            vectors = state.vectors if len(state.vectors) > 1 else state.vectors[0]
        y, last = self.rnn(x, vectors, lengths)  # (B, T, hidden)
        if state is not None:
            state.advance(last if isinstance(last, tuple) else (last,), ids.shape[1] if lengths is None else lengths)
        return self.dropout(y)

    def new_state(self, batch_size: int, max_length: int | None = None) -> RecurrentState:
        count = 2 if isinstance(self.rnn, nn.LSTM) else 1
        zeros = torch.zeros(self.rnn.num_layers, batch_size, self.rnn.hidden_size, dtype=self.dtype, device=self.device)
        return RecurrentState(*(zeros.clone() for _ in range(count)))
