from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyllm import _C


class Sample(NamedTuple):
    """What `sample` drew, or was given, (B,) each: the ids (int64) and their log-probabilities (float32), under the
    logits as they came and under the distribution that was drawn from."""

    ids: Tensor
    logprobs: Tensor
    processed_logprobs: Tensor


def sample(logits: Tensor, *, seeds: int | Tensor, positions: int | Tensor, temperature: float | Tensor = 1.0,
           top_k: int | Tensor = 0, top_p: float | Tensor = 1.0, min_p: float | Tensor = 0.0,
           typical_p: float | Tensor = 1.0, repetition_penalty: float | Tensor = 1.0,
           frequency_penalty: float | Tensor = 0.0, presence_penalty: float | Tensor = 0.0,
           history: Tensor | None = None, logit_bias: Tensor | None = None,
           given: Tensor | None = None) -> Sample:  # fmt: skip
    """Draws one id from each row of logits.

    Each setting is a number, or a tensor (B,) with one for each row: float32, or int64 for seeds, positions and top_k.
    A row goes through these steps in this order:

    1. repetition_penalty r: a positive logit of an id in the history is divided by r, another one multiplied (Keskar et
       al., 2019, https://arxiv.org/abs/1909.05858). Then frequency_penalty x (how often the id is in the history) and
       presence_penalty are subtracted from it, as in OpenAI's API.
    2. logit_bias is added.
    3. The logits are divided by temperature. Temperature 0 takes the id with the largest logit, the lowest such id
       where several tie, and no further step.
    4. top_k: an id stays if fewer than k ids have larger logits (all that tie at the border stay). 0 is off.
    5. top_p: an id stays if the ids with larger logits have less than p of the probability of those that are left (all
       that tie at the border stay; Holtzman et al., 2019, https://arxiv.org/abs/1904.09751). 1 is off.
    6. min_p: an id stays if its probability is at least min_p of the largest (https://arxiv.org/abs/2407.01082).
    7. typical_p: an id stays if the ids whose surprise -log(probability) is closer to its mean, the entropy, have less
       than p of the probability of those that are left (Meister et al., 2022, https://arxiv.org/abs/2202.00666).
       1 is off.
    8. A uniform number u comes from Philox 4x32-10 with seed as the key and position as the counter; the draw is the
       first id, in ascending order, at which the sum of the probabilities left passes u.

    A row's draw has the same bits alone, in any batch, and for any number of threads. With logits on a CUDA device the
    settings are still numbers or tensors on the CPU, and a row that is wrong has NaN for its log-probabilities: the
    next call on the device, or `pyllm.synchronize`, raises. A logit of -infinity masks its id.

    Args:
        logits: (B, V), float32, bfloat16 or float16, of any strides.
        seeds, positions: say which random number a row gets. Any 64-bit integers; the same pair gives the same number.
        history: (B, L), int64: the ids that the penalties apply to, -1 for none. A penalty needs it.
        logit_bias: (V,) or (B, V), float32; -infinity masks an id.
        given: (B,), int64: an id that is taken in place of a draw, with the log-probabilities that it has when drawn,
            or -infinity where it cannot be drawn; -1 for a draw.

    Raises:
        ValueError, TypeError: a shape, dtype or setting that does not fit; a row with NaN, infinity or -infinity only.
        IndexError: an id of the history, or one given, that is not from 0 to V - 1 or -1.
    """
    if logits.dim() == 2 and logits.stride(1) != 1:
        logits = logits.contiguous()
    if logit_bias is not None and logit_bias.stride(-1) != 1:
        logit_bias = logit_bias.contiguous()
    if given is not None:
        given = given.contiguous()
    rows = logits.shape[0] if logits.dim() else 0  # a number: to give a torch.Size costs a call 1 us
    ids = logits.new_empty(rows, dtype=torch.int64)
    logprobs = logits.new_empty(rows, dtype=torch.float32)
    processed = logits.new_empty(rows, dtype=torch.float32)
    if logits.requires_grad:
        logits = logits.detach()
    _C.sample(logits, seeds, positions, temperature, top_k, top_p, min_p, typical_p, repetition_penalty,
              frequency_penalty, presence_penalty, history, logit_bias, given, ids, logprobs, processed)  # fmt: skip
    return Sample(ids, logprobs, processed)
