from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from pyllm import ops
from pyllm.nn.quantized import Quantizable


class Embedding(Quantizable, torch.nn.Embedding):
    """torch.nn.Embedding on `pyllm.ops.embedding`: ids (...) -> (..., embedding_dim); a bad id is an IndexError.

    Once quantised (see `Quantizable`), it runs on `pyllm.ops.quantized_embedding`, and gives vectors of the dtype that
    the weight had, or of that to which the model is converted from then on.
    """

    like: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int, *, device=None, dtype=None):
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        if self.packed is not None:
            return ops.quantized_embedding(ids, self.packed, self.like.dtype)
        return ops.embedding(ids, self.weight)

    def sizes(self) -> dict[str, tuple[int, int]]:
        return {"weight": (self.num_embeddings, self.embedding_dim)}

    def quantize_(self, weight: ops.QuantizedWeight | ops.PackedQuantizedWeight, name: str = "weight") -> None:
        dtype = torch.float32 if self.weight is None else self.weight.dtype
        super().quantize_(weight, name)
        like = torch.empty(0, dtype=dtype, device=cast(ops.PackedQuantizedWeight, self.packed).device)
        self.register_buffer("like", like, persistent=False)  # conversions of the model change its dtype
