from __future__ import annotations

from typing import Any

from pyllm import nn
from pyllm.models import Model


class Watch:
    """Sees that a model has been trained, quantised or taken apart since it was last asked, so that what was recorded
    and computed of it holds no longer."""

    def __init__(self, model: Model):
        self.model = model
        self.known = self._made_of()

    def changed(self) -> bool:
        before, self.known = self.known, self._made_of()
        return len(before) != len(self.known) or any(
            a is not b or v != w for (a, v), (b, w) in zip(before, self.known, strict=True))  # fmt: skip

    def _made_of(self) -> list[tuple[Any, Any]]:
        """Modules, parameters and quantised weights, in one walk: it is made before each step of an idle engine. What
        is assigned to a parameter's `data` leaves its version as it was, but lies elsewhere."""
        parts: list[tuple[Any, Any]] = []
        left: list[Any] = [self.model]
        while left:
            module = left.pop()
            parts.append((module, None))
            parts += [(p, (p._version, p.data_ptr())) for p in module._parameters.values() if p is not None]
            if isinstance(module, nn.Quantizable):
                parts += [(weight, None) for weight in module.quantized.values()]
            left += [m for m in module._modules.values() if m is not None]
        return parts
