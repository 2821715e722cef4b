"""Which pages of a pool hold which positions of which sequence."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Holding:
    """What one sequence holds: the pages of its positions in order, None for those given back, of which the first
    `length` positions are written."""

    pages: list[int | None]
    length: int = 0
    digests: list[bytes] = field(default_factory=list)  # of the full pages so far, each with all before it
    row: Any = None  # of a batch's page table, once there is one
    source: Any = None  # of an answer: what it answers
    private: bool = False  # what is in its pages is not what its ids say


class Pages:
    """Allocates the pages of a pool of `count`, of `size` positions each. Nothing ever exceeds it.

    A sequence takes all pages that it may need when it begins, so that it can always end, and full pages are shared
    between sequences that begin with the same ids, also after those that wrote them have ended, as long as nothing else
    needs the room. Only the pages before a sequence's length are ever shared, and nobody writes there.
    """

    def __init__(self, count: int, size: int, *, reuse: bool = True):
        if count < 1 or size < 1:
            raise ValueError(f"count and size must be at least 1, but got {count} and {size}")
        self.count, self.size, self.reuse = count, size, reuse
        self._free = list(range(count - 1, -1, -1))
        self._references = [0] * count
        self._page_of: dict[bytes, int] = {}  # full pages by the digest of their ids and all before them
        self._digest_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # that no sequence holds, but may yet: the oldest go first

    @property
    def available(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free) + len(self._idle)

    def needed(self, positions: int) -> int:
        return -(-positions // self.size)

    def take(self, ids: Sequence[int], positions: int) -> Holding | None:
        """Pages for a sequence that begins with `ids` and has at most `positions`; None if there are too few now.

        Its `length` says how many ids have their keys and values already: whole pages of them, and never the last id.
        """
        digests, shared = [], []
        if self.reuse:
            for digest in self._digests(b"", ids[: len(ids) - 1]):
                page = self._page_of.get(digest)
                if page is None:
                    break
                digests.append(digest)
                shared.append(page)
        fresh = max(self.needed(positions) - len(shared), 0)
        if fresh > self.available - sum(page in self._idle for page in shared):
            return None
        for page in shared:
            self._hold(page)
        return Holding([*shared, *(self._fresh() for _ in range(fresh))], len(shared) * self.size, digests)

    def note(self, holding: Holding, ids: Sequence[int], length: int) -> None:
        """Says that the sequence's first `length` positions are written, and are those of the first ids."""
        holding.length = length
        known = len(holding.digests)
        if not self.reuse or holding.private or length < (known + 1) * self.size:
            return
        last = holding.digests[-1] if holding.digests else b""
        for digest in self._digests(last, ids[known * self.size : length]):
            page = holding.pages[len(holding.digests)]
            holding.digests.append(digest)
            if page is not None and digest not in self._page_of:
                self._page_of[digest], self._digest_of[page] = page, digest

    def fork(self, holding: Holding, length: int | None = None) -> tuple[Holding, tuple[int, int] | None] | None:
        """(a second sequence that goes on from the first `length` positions of the first, or all of them, the page to
        copy and where to, if any); None if there are too few pages now. Full pages are shared."""
        length = holding.length if length is None else length
        full = length // self.size
        fresh = len(holding.pages) - full
        if fresh > self.available:
            return None
        for page in holding.pages[:full]:
            if page is not None:
                self._references[page] += 1
        twin = Holding([*holding.pages[:full], *(self._fresh() for _ in range(fresh))], length, holding.digests[:full])
        if length % self.size == 0:
            return twin, None
        source, target = holding.pages[full], twin.pages[full]
        assert source is not None and target is not None
        return twin, (source, target)

    def slide(self, holding: Holding, first: int) -> None:
        """Gives back the pages that lie wholly before position `first`, which will not be read again."""
        for i in range(min(first // self.size, len(holding.pages)) - 1, -1, -1):
            page = holding.pages[i]
            if page is None:
                return
            self._let_go(page)
            holding.pages[i] = None

    def forget(self) -> None:
        """What is known of the ids of pages no longer holds; who has pages keeps them."""
        self._free.extend(self._idle)
        for known in (self._page_of, self._digest_of, self._idle):
            known.clear()

    def give(self, holding: Holding) -> None:
        """Gives back all that the sequence holds."""
        for page in reversed(holding.pages):  # of what may be shared again, the last pages go first
            if page is not None:
                self._let_go(page)
        holding.pages.clear()

    def _digests(self, digest: bytes, ids: Sequence[int]):
        for first in range(0, len(ids) - self.size + 1, self.size):
            digest = hashlib.sha256(digest + array("q", ids[first : first + self.size]).tobytes()).digest()
            yield digest

    def _hold(self, page: int) -> None:
        self._idle.pop(page, None)
        self._references[page] += 1

    def _fresh(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._digest_of.pop(page)]
        self._references[page] = 1
        return page

    def _let_go(self, page: int) -> None:
        self._references[page] -= 1
        if self._references[page]:
            return
        if page in self._digest_of:
            self._idle[page] = None
        else:
            self._free.append(page)
