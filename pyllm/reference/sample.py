from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sample(NamedTuple):
    ids: Tensor
    logprobs: Tensor
    processed_logprobs: Tensor


def sample(logits: Tensor, *, seeds: int | Tensor, positions: int | Tensor, temperature: float | Tensor = 1.0,
           top_k: int | Tensor = 0, top_p: float | Tensor = 1.0, min_p: float | Tensor = 0.0,
           typical_p: float | Tensor = 1.0, repetition_penalty: float | Tensor = 1.0,
           frequency_penalty: float | Tensor = 0.0, presence_penalty: float | Tensor = 0.0,
           history: Tensor | None = None, logit_bias: Tensor | None = None,
           given: Tensor | None = None) -> Sample:  # fmt: skip
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    processed = distribution(x, temperature, top_k, top_p, min_p, typical_p, repetition_penalty, frequency_penalty,
                             presence_penalty, history, logit_bias)  # fmt: skip
    cdf = processed.double().exp().cumsum(-1)
    u = uniform(seeds, positions, len(logits))[:, None] * cdf[:, -1:]
    ids = (cdf > u).int().argmax(-1)
    if given is not None:
        ids = torch.where(given < 0, ids, given)
    pick = ids[:, None]
    return Sample(ids, x.log_softmax(-1).gather(1, pick)[:, 0].to(torch.promote_types(x.dtype, torch.float32)),
                  processed.gather(1, pick)[:, 0])  # fmt: skip


def distribution(x: Tensor, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0, repetition_penalty=1.0,
                 frequency_penalty=0.0, presence_penalty=0.0, history=None, logit_bias=None) -> Tensor:  # fmt: skip
    """The log-probabilities (B, V) that `sample` draws from, in x's dtype; -inf for an id that is filtered out."""

    def column(setting, dtype=x.dtype):
        return torch.as_tensor(setting, dtype=dtype).expand(len(x))[:, None]

    z = x
    if history is not None:
        counts = torch.zeros_like(x).scatter_add_(1, history.clamp(min=0), (history >= 0).to(x.dtype))
        repetition = column(repetition_penalty)
        repeated = torch.where(z > 0, z / repetition, z * repetition)
        z = torch.where(counts > 0, repeated - counts * column(frequency_penalty) - column(presence_penalty), z)
    if logit_bias is not None:
        z = z + logit_bias
    ids = torch.arange(x.shape[1], device=x.device)
    best = z.amax(-1, keepdim=True)
    first_best = torch.where(z == best, ids, len(ids)).amin(-1, keepdim=True)
    heat = column(temperature)
    greedy = torch.where(ids == first_best, 0.0, -torch.inf).to(x.dtype)
    y = (z - best) / torch.where(heat > 0, heat, 1)

    k = column(top_k, torch.int64)
    kth = y.sort(-1, descending=True).values.gather(1, (k - 1).clamp(0, len(ids) - 1))
    y = y.masked_fill((y < kth) & (k > 0), -torch.inf)

    p = column(top_p)
    y = y.masked_fill((y < _border(y, y, p)) & (p < 1), -torch.inf)

    y = y.masked_fill(y < column(min_p).log(), -torch.inf)

    p = column(typical_p)
    log_p = y.log_softmax(-1)
    entropy = -torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0).sum(-1, keepdim=True)
    closeness = -(log_p + entropy).abs()
    y = y.masked_fill((closeness < _border(closeness, y, p)) & (p < 1), -torch.inf)
    return torch.where(heat > 0, y.log_softmax(-1), greedy)


def _border(key: Tensor, y: Tensor, p: Tensor) -> Tensor:
    """The smallest key such that the ids with greater ones have less than p of the probability (softmax of y)."""
    key, order = key.sort(-1, descending=True)
    mass = y.softmax(-1).gather(1, order)
    return torch.where(mass.cumsum(-1) - mass < p, key, torch.inf).amin(-1, keepdim=True)


def uniform(seeds: int | Tensor, positions: int | Tensor, rows: int) -> Tensor:
    """A number in [0, 1) with 53 random bits for each row: Philox with seed as the key and position as the counter."""
    seed, position = (torch.as_tensor(t, dtype=torch.int64).expand(rows) for t in (seeds, positions))
    low = 0xFFFFFFFF
    words = philox([position & low, position >> 32 & low, position * 0, position * 0], [seed & low, seed >> 32 & low])
    return ((words[0] >> 5) * 2**26 + (words[1] >> 6)).double() * 2.0**-53


def philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox 4x32-10 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3") on int64 words below 2^32."""
    low = 0xFFFFFFFF
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57  # modulo 2^64: the upper half is right although the sign is not
        a, b, c, d = (q >> 32 & low) ^ b ^ k0, q & low, (p >> 32 & low) ^ d ^ k1, p & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return [a, b, c, d]
