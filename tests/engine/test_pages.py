"""The allocator of pages against a model of it that keeps what each page holds."""

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from pyllm.engine.pages import Pages

SIZE, COUNT = 4, 12
OPERATIONS = 10_000
ids = st.lists(st.integers(0, 1), min_size=1, max_size=22)  # few different ids, so that prefixes are shared
done: Counter[str] = Counter()  # operations of all machines, but for those that did nothing


class Machine(RuleBasedStateMachine):
    """Writes ids to pages as a model would write keys, and reads them back."""

    def __init__(self):
        super().__init__()
        self.pages = Pages(COUNT, SIZE, least=1)
        self.memory = [[None] * SIZE for _ in range(COUNT)]
        self.sequences = []  # [holding, ids, positions, first that is read]

    sequences = Bundle("sequences")

    @rule(target=sequences, prompt=ids, more=st.integers(0, 8))
    def submit(self, prompt, more):
        before, positions = self.pages.available, len(prompt) + more
        holding = self.pages.take(prompt, positions)
        if holding is None:
            assert before < self.pages.needed(positions) and self.pages.available == before
            done["refused"] += 1
            return multiple()
        done["submitted"] += 1
        assert holding.length < len(prompt) and len(holding.pages) == self.pages.needed(positions)
        assert (holding.copy is None) == (holding.length % SIZE == 0)
        if holding.copy is not None:
            self.memory[holding.copy[1]] = list(self.memory[holding.copy[0]])
            self.pages.copied(holding)
        sequence = [holding, prompt[: holding.length], positions, 0]
        self.sequences.append(sequence)
        self.write(sequence, prompt)
        return sequence

    @rule(sequence=sequences, i=st.integers(0, 1))
    def draw(self, sequence, i):
        if len(sequence[1]) < sequence[2]:
            done["drawn"] += 1
            self.write(sequence, [*sequence[1], i])

    @rule(target=sequences, sequence=sequences, back=st.integers(0, 6))
    def fork(self, sequence, back):
        holding, written, positions, first = sequence
        length = max(len(written) - back, -(-first // SIZE) * SIZE)  # what was given back cannot be gone on with
        if length > len(written) or len(written) == 0:
            return multiple()
        made = self.pages.fork(holding, length)
        if made is None:
            assert self.pages.available < len(holding.pages) - length // SIZE
            return multiple()
        done["forked"] += 1
        twin, copy = made
        if copy is not None:
            self.memory[copy[1]] = list(self.memory[copy[0]])
        self.sequences.append([twin, written[:length], positions, first])
        return self.sequences[-1]

    @rule(rarely=st.integers(0, 19))  # what is known would never be used
    def forget(self, rarely):
        if rarely == 7:
            done["forgotten"] += 1
            self.pages.forget()

    @rule(sequence=sequences, window=st.integers(1, 9))
    def slide(self, sequence, window):
        done["slid"] += 1
        sequence[3] = max(sequence[3], len(sequence[1]) - window)
        self.pages.slide(sequence[0], sequence[3])

    @rule(sequence=consumes(sequences))
    def finish(self, sequence):
        done["finished"] += 1
        self.pages.give(sequence[0])
        self.sequences = [s for s in self.sequences if s is not sequence]

    def write(self, sequence, to):
        holding, written, *_ = sequence
        for j in range(len(written), len(to)):
            page = holding.pages[j // SIZE]
            assert [page in s[0].pages for s in self.sequences].count(True) == 1  # nobody else's
            self.memory[page][j % SIZE] = to[j]
        sequence[1] = list(to)
        self.pages.note(holding, to, len(to))

    @invariant()
    def each_reads_its_own_and_no_page_is_lost(self):
        held = set()
        for holding, written, _, first in self.sequences:
            held.update(page for page in holding.pages if page is not None)
            for j in range(first, len(written)):
                assert self.memory[holding.pages[j // SIZE]][j % SIZE] == written[j]
        assert self.pages.available == COUNT - len(held)


def test_ten_thousand_operations():
    done.clear()
    while done.total() < OPERATIONS:  # an example may have fewer steps than it could
        run_state_machine_as_test(Machine, settings=settings(max_examples=100, stateful_step_count=50))
    assert len(done) == 7 and min(done.values()) > OPERATIONS // 500


def test_a_prefix_is_found_until_its_room_is_needed():
    pages, prompt = Pages(4, 4), list(range(9))
    first = pages.take(prompt, 9)
    pages.note(first, prompt, 9)
    second = pages.take(prompt, 12)
    assert second.length == 8 and second.pages[:2] == first.pages[:2] and pages.available == 0
    assert pages.take([5], 1) is None
    pages.give(first), pages.give(second)
    assert pages.available == 4
    third = pages.take(prompt[:8], 8)
    assert third.length == 4 and pages.available == 2  # the last id is always left to be read
    pages.give(third)
    pages.give(pages.take([7], 16))  # all of the room
    assert pages.take(prompt, 9).length == 0


def test_a_page_that_begins_the_same_is_copied():
    pages, prompt = Pages(5, 4, least=2), list(range(8))
    first = pages.take(prompt, 8)
    pages.note(first, prompt[:7], 7)
    assert pages.take([0, 1, 2, 3, 4, 9], 6).copy is None  # one id is not worth it
    for _ in range(2):  # also after the sequence has ended
        second = pages.take([0, 1, 2, 3, 4, 5, 9, 9], 8)
        assert second.length == 6 and second.copy == (first.pages[1], second.pages[1])
        source = second.copy[0]
        pages.copied(second)
        pages.give(second)
        if first.pages:
            pages.give(first)
            first.pages = [None, source]
    full = pages.take([7], 12)  # leaves room for what is held alone
    second = pages.take([0, 1, 2, 3, 4, 5, 9, 9], 8)
    assert full is not None and second is None


def test_a_copy_is_made_only_where_there_is_room_for_both():
    pages, prompt = Pages(3, 4, least=2), list(range(8))
    pages.note(first := pages.take(prompt, 8), prompt[:7], 7)
    pages.give(first)
    second = pages.take([0, 1, 2, 3, 4, 5, 9, 9, 9], 12)  # takes all of the room, also where the copy's source is
    assert second.length == 4 and second.copy is None and pages.available == 0


def test_without_reuse_nothing_is_shared():
    pages = Pages(6, 4, reuse=False)
    first = pages.take(range(9), 9)
    pages.note(first, range(9), 9)
    pages.give(first)
    assert pages.take(range(9), 9).length == 0


def test_settings_are_checked():
    with pytest.raises(ValueError, match="count and size must be at least 1, but got 0 and 4"):
        Pages(0, 4)
