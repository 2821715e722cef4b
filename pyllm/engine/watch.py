from __future__ import annotations

from typing import Any

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
            a[0] is not b[0] or a[1] != b[1] for a, b in zip(before, self.known, strict=True))  # fmt: skip

    def _made_of(self) -> list[tuple[Any, int]]:
        parts = [*self.model.modules(), *self.model.quantized_weights()]
        return [*((part, 0) for part in parts), *((p, p._version) for p in self.model.parameters())]
