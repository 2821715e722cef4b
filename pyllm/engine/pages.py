"""Which pages of a pool hold which positions of which sequence."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

LEAST = 8  # ids at the beginning of a page that are worth a copy of it: less is soon read again


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
    copy: tuple[int, int] | None = None  # the page whose beginning it needs, and the one of its own that is to have it


class Pages:
    """Allocates the pages of a pool of `count`, of `size` positions each. Nothing ever exceeds it.

    A sequence takes all pages that it may need when it begins, so that it can always end, and full pages are shared
    between sequences that begin with the same ids, also after those that wrote them have ended, as long as nothing else
    needs the room. Only the pages before a sequence's length are ever shared, and nobody writes there. A page of which
    the beginning alone is the same is copied.
    """

    def __init__(self, count: int, size: int, *, reuse: bool = True, least: int = LEAST):
        if count < 1 or size < 1:
            raise ValueError(f"count and size must be at least 1, but got {count} and {size}")
        self.count, self.size, self.reuse, self.least = count, size, reuse, least
        self._free = list(range(count - 1, -1, -1))
        self._references = [0] * count
        self._page_of: dict[bytes, int] = {}  # full pages by the digest of their ids and all before them
        self._digest_of: dict[int, bytes] = {}
        # The ids of pages, also of some that are not full, by the digest of all before them and the first of them.
        self._begun: dict[tuple[bytes, int], dict[int, tuple[int, ...]]] = {}
        self._begun_of: dict[int, tuple[bytes, int]] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # that no sequence holds, but may yet: the oldest go first

    @property
    def available(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free) + len(self._idle)

    def needed(self, positions: int) -> int:
        return -(-positions // self.size)

    def take(self, ids: Sequence[int], positions: int) -> Holding | None:
        """Pages for a sequence that begins with `ids` and has at most `positions`; None if there are too few now.

        Its `length` says how many ids have their keys and values already, never the last one: whole pages of them, and
        what is to be copied as `copy` says, if it says so, before `copied` is called.
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
        known = len(shared) * self.size
        source, count = self._longest(digests[-1] if digests else b"", ids[known : len(ids) - 1])
        if source is None or (source in self._idle and fresh == self.available):
            return Holding([*shared, *(self._fresh() for _ in range(fresh))], known, digests)
        self._hold(source)
        own = [self._fresh() for _ in range(fresh)]
        return Holding([*shared, *own], known + count, digests, copy=(source, own[0]))

    def copied(self, holding: Holding) -> None:
        """Says that what `copy` asks for is done."""
        assert holding.copy is not None
        self._let_go(holding.copy[0])
        holding.copy = None

    def note(self, holding: Holding, ids: Sequence[int], length: int) -> None:
        """Says that the sequence's first `length` positions are written, and are those of the first ids."""
        holding.length = length
        if not self.reuse or holding.private:
            return
        first = len(holding.digests) * self.size
        last = holding.digests[-1] if holding.digests else b""
        for digest in self._digests(last, ids[first:length]):
            page = holding.pages[len(holding.digests)]
            holding.digests.append(digest)
            if page is not None and digest in self._page_of:
                self._forget_beginning(page)  # there is another
            elif page is not None:
                self._page_of[digest], self._digest_of[page] = page, digest
                self._note_beginning(page, last, ids[first : first + self.size])
            last, first = digest, first + self.size
        page = holding.pages[len(holding.digests)] if first < length else None
        if page is not None and length - first >= self.least:
            self._note_beginning(page, last, ids[first:length])

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
        for known in (self._page_of, self._digest_of, self._begun, self._begun_of, self._idle):
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

    def _longest(self, before: bytes, ids: Sequence[int]) -> tuple[int | None, int]:
        """(the page that begins with the most of some ids, how many)."""
        best, count = None, self.least - 1
        if len(ids) > count:
            for page, known in self._begun.get((before, ids[0]), {}).items():
                same = next((i for i, (a, b) in enumerate(zip(ids, known, strict=False)) if a != b), None)
                same = min(len(ids), len(known)) if same is None else same
                if same > count:
                    best, count = page, same
        return best, count

    def _note_beginning(self, page: int, before: bytes, ids: Sequence[int]) -> None:
        key = self._begun_of[page] = before, ids[0]
        self._begun.setdefault(key, {})[page] = tuple(ids)

    def _forget_beginning(self, page: int) -> None:
        key = self._begun_of.pop(page, None)
        if key is not None:
            del self._begun[key][page]
            if not self._begun[key]:
                del self._begun[key]

    def _hold(self, page: int) -> None:
        self._idle.pop(page, None)
        self._references[page] += 1

    def _fresh(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            if page in self._digest_of:
                del self._page_of[self._digest_of.pop(page)]
            self._forget_beginning(page)
        self._references[page] = 1
        return page

    def _let_go(self, page: int) -> None:
        self._references[page] -= 1
        if self._references[page]:
            return
        if page in self._digest_of or page in self._begun_of:
            self._idle[page] = None
        else:
            self._free.append(page)
