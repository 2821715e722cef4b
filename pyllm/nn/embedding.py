from __future__ import annotations

import torch
from torch import Tensor

from pyllm import ops


class Embedding(torch.nn.Embedding):
    """torch.nn.Embedding on `pyllm.ops.embedding`: ids (...) -> (..., embedding_dim); a bad id is an IndexError."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, device=None, dtype=None):
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return ops.embedding(ids, self.weight)
