"""Rounding a weight column by column, each error made up for by the columns that are still to come (GPTQ, Frantar et
al., 2022, https://arxiv.org/abs/2210.17323): the layer's outputs on calibration text stay as near as they can."""

from __future__ import annotations

import torch
from torch import Tensor

from pyllm.ops import QuantizedWeight
from pyllm.ops.quantized_linear import PIECE
from pyllm.quantization.groups import choose_groups
from pyllm.quantization.units import choose_multiples, choose_units
from pyllm.quantization.weights import pack_wholes

_DAMPING = 0.01  # of the mean of the diagonal


def quantize_compensated(weight: Tensor, moments: Tensor, bits: int, *, minimums: bool = False,
                         group: int = 32) -> QuantizedWeight:  # fmt: skip
    """Args:
    weight: (N, K).
    moments: (K, K), the sum of x x^T over the layer's inputs x.
    """
    n, k = weight.shape
    w = torch.nn.functional.pad(weight.detach().float(), (0, -k % group))
    size = w.shape[1]
    h = torch.eye(size, dtype=torch.float64, device=w.device)
    h[:k, :k] = moments.double()
    diagonal = h.diagonal()
    silent = diagonal == 0
    diagonal[silent] = 1.0
    w[:, silent] = 0.0
    diagonal += _DAMPING * diagonal[:k].mean()
    # The columns' errors, in order, are made up for by the rows of this factor of the inverse.
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    weigh = 1.0 / factor.diagonal().square()
    in_units = bits == 4 and group > PIECE
    step = PIECE if in_units else group
    wholes, scales, lows = [], [], []
    for start in range(0, size, step):
        end = start + step
        if in_units and start % group == 0:
            pieces, importance = (t[..., start : start + group].unflatten(-1, (1, -1, PIECE)) for t in (w, weigh))
            units = choose_units(pieces, minimums, importance)
        columns = w[:, start:end].clone()
        if in_units:
            groups = choose_multiples(columns[:, None, None], units, minimums, weigh[None, None, start:end])
        else:
            groups = choose_groups(columns[:, None], bits, minimums, weigh[None, start:end])
        whole, errors = w.new_empty(n, step), w.new_empty(n, step)
        for j in range(step):
            whole[:, j : j + 1] = groups.round(columns[:, j : j + 1], 0)
            value = groups.value(whole[:, j : j + 1], 0)
            errors[:, j] = (columns[:, j] - value[:, 0]) / factor[start + j, start + j]
            columns[:, j:] -= errors[:, j : j + 1] * factor[start + j, start + j : end]
        w[:, end:] -= errors @ factor[start:end, end:]
        wholes.append(whole.to(torch.uint8))
        scales.append(groups.scales)
        lows += [] if groups.minimums is None else [groups.minimums]
    low = torch.cat(lows, 1).half() if minimums else None
    return pack_wholes(torch.stack(wholes, 1), torch.cat(scales, 1).half(), low, bits, (n, k), group)
