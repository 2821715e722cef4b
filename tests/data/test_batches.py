import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from pyllm.data import SequenceDataset, SequenceLoader

sizes = {"n": st.integers(2, 300), "rows": st.integers(1, 9), "width": st.integers(1, 20)}


def epoch_of(loader, epoch=0):
    return [loader.batch(epoch, step) for step in range(len(loader))]


@given(**sizes)
def test_rows_go_on_from_batch_to_batch(n, rows, width):
    if n < rows * width + 1:
        return
    loader = SequenceLoader(torch.arange(n), rows, width)
    assert loader.contiguous and len(loader) == (n - 1) // (rows * width)
    before = None
    for inputs, targets in loader:
        assert inputs.shape == targets.shape == (rows, width)
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.is_contiguous() and targets.is_contiguous()
        assert torch.equal(targets, inputs + 1)
        assert before is None or torch.equal(inputs[:, 0], before)
        before = targets[:, -1]
    seen = torch.cat([targets.flatten() for _, targets in loader])
    assert len(seen.unique()) == len(seen) == loader.tokens == len(loader) * rows * width


@given(**sizes)
def test_every_token_is_scored_once(n, rows, width):
    loader = SequenceLoader(list(range(n)), rows, width, drop_last=False)
    batches = list(loader)
    assert len(batches) == len(loader)
    seen = torch.cat([targets.flatten() for _, targets in batches])
    assert sorted(seen.tolist()) == list(range(1, n)) and loader.tokens == n - 1
    windows = {tuple(row.tolist()) for inputs, _ in batches for row in inputs}
    assert windows == {tuple(range(a, min(a + width, n - 1))) for a in range(0, n - 1, width)}
    for (inputs, targets), (later, _) in itertools.pairwise(batches):
        assert torch.equal(targets, inputs + 1)
        assert len(later) <= len(inputs)
        assert torch.equal(later[:, 0], targets[-len(later) :, -1])


@given(**sizes, seed=st.integers(0, 2**40))
def test_shuffled_windows_do_not_overlap(n, rows, width, seed):
    if n < rows * width + 1:
        return
    loader = SequenceLoader(torch.arange(n), rows, width, shuffle=True, seed=seed)
    assert not loader.contiguous
    for epoch in range(3):
        batches = epoch_of(loader, epoch)
        assert len(batches) >= max(1, (n - width) // (rows * width))
        seen = torch.cat([targets.flatten() for _, targets in batches])
        assert len(seen.unique()) == len(seen) == loader.tokens
        assert len({int(row[0]) % width for inputs, _ in batches for row in inputs}) == 1
        for inputs, targets in batches:
            assert inputs.shape == (rows, width)
            assert torch.equal(targets, inputs + 1)
            assert torch.equal(inputs, inputs[:, :1] + torch.arange(width))


def test_each_epoch_and_seed_has_an_order_of_its_own():
    def order(seed, epoch):
        loader = SequenceLoader(torch.arange(10_000), 4, 16, shuffle=True, seed=seed)
        return tuple(int(i) for inputs, _ in epoch_of(loader, epoch) for i in inputs[:, 0])

    orders = {order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert len({o[0] % 16 for o in orders}) > 1, "the offset is always the same"
    assert order(1, 2) == order(1, 2)


@pytest.mark.parametrize("options", [{}, {"shuffle": True, "seed": 7}, {"drop_last": False}], ids=str)
def test_any_step_can_be_asked_for_again(options):
    ids = torch.randint(0, 50, (1000,))
    loader = SequenceLoader(ids, 3, 7, **options)
    whole = [[tuple(map(torch.clone, batch)) for batch in epoch_of(loader, epoch)] for epoch in range(3)]
    for epoch, step in [(2, 5), (0, 0), (1, len(loader) - 1), (2, 5), (0, 3)]:
        again = SequenceLoader(ids, 3, 7, **options).batch(epoch, step)
        for batch in (again, loader.batch(epoch, step)):
            assert all(map(torch.equal, batch, whole[epoch][step]))
    loader.batch(0, 0)[0].zero_()
    assert all(map(torch.equal, loader.batch(0, 0), whole[0][0])), "a batch shares memory with the corpus"


def test_iterating_counts_epochs():
    loader = SequenceLoader(torch.arange(1000), 4, 10, shuffle=True)
    first = list(loader)
    assert loader.epoch == 1
    for _ in loader:
        break
    assert loader.epoch == 1, "an epoch that was left early is not over"
    second = list(loader)
    assert loader.epoch == 2
    loader.epoch = 0
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(loader, first, strict=True))
    loader.epoch = 1
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(loader, second, strict=True))
    assert not torch.equal(first[0][0], second[0][0])


def test_ids_of_many_kinds():
    expected = SequenceLoader(list(range(100)), 2, 5).batch(0, 3)
    read_only = np.arange(100)
    read_only.flags.writeable = False
    strided = torch.arange(100).repeat_interleave(2)[::2]
    for ids in (torch.arange(100), torch.arange(100, dtype=torch.int32), torch.arange(100, dtype=torch.uint8), strided,
                tuple(range(100)), np.arange(100), read_only, np.arange(100, dtype=np.uint16)):  # fmt: skip
        loader = SequenceLoader(ids, 2, 5)
        assert all(map(torch.equal, loader.batch(0, 3), expected))
        assert loader.ids.dtype in (torch.int32, torch.int64)
        if isinstance(ids, torch.Tensor) and ids.dtype != torch.uint8:
            assert loader.ids.data_ptr() == ids.data_ptr(), "the corpus was copied"


def test_the_device_of_the_batches():
    inputs, targets = SequenceLoader(torch.arange(100), 2, 5, device="meta").batch(0, 0)
    assert inputs.device.type == targets.device.type == "meta"


def test_a_short_corpus_is_an_error():
    for options in ({}, {"shuffle": True}):
        with pytest.raises(ValueError, match="one batch of 4 x 10 needs 41 tokens, but the corpus has 40"):
            SequenceLoader(torch.arange(40), 4, 10, **options)
        assert len(SequenceLoader(torch.arange(41), 4, 10, **options)) == 1
    for ids in ([], [3], torch.tensor([])):
        with pytest.raises(ValueError, match=f"one target needs 2 tokens, but the corpus has {len(ids)}"):
            SequenceLoader(ids, 4, 10, drop_last=False)
    assert SequenceLoader([3, 5], 4, 10, drop_last=False).batch(0, 0)[1].tolist() == [[5]]
    with pytest.raises(ValueError, match="one window needs 11 tokens, but the corpus has 10"):
        SequenceDataset(torch.arange(10), 10)


def test_bad_arguments():
    ids = torch.arange(100)
    for arguments, message in [
        ((ids, 0, 5), "batch_size must be an integer of at least 1, but got 0"),
        ((ids, 2, -5), "sequence_length must be an integer of at least 1, but got -5"),
        ((ids, 2, 5.0), r"sequence_length must be an integer of at least 1, but got 5\.0"),
        ((ids.view(10, 10), 2, 5), r"ids must have 1 dimension, but got shape \(10, 10\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            SequenceLoader(*arguments)
    with pytest.raises(ValueError, match="seed must be an integer of at least 0, but got -1"):
        SequenceLoader(ids, 2, 5, seed=-1)
    with pytest.raises(ValueError, match="drop_last=False scores every token in order"):
        SequenceLoader(ids, 2, 5, shuffle=True, drop_last=False)
    for floats in (ids.float(), [1.5] * 100, ids > 3):
        with pytest.raises(TypeError, match="ids must be integers, but got torch"):
            SequenceLoader(floats, 2, 5)
    loader = SequenceLoader(ids, 2, 5)
    for epoch, step in [(0, -1), (0, len(loader)), (-1, 0)]:
        with pytest.raises(IndexError, match="must be"):
            loader.batch(epoch, step)


def test_torchs_own_loader_over_the_dataset():
    dataset = SequenceDataset(np.arange(103, dtype=np.int32), 10)
    assert len(dataset) == 10
    assert torch.equal(dataset[9][1], torch.arange(91, 101)) and torch.equal(dataset[-1][0], dataset[9][0])
    with pytest.raises(IndexError, match=r"index must be in \[0, 10\), but got 10"):
        dataset[10]
    seen = []
    for inputs, targets in DataLoader(dataset, batch_size=4, shuffle=True, drop_last=True):
        assert inputs.shape == targets.shape == (4, 10) and inputs.dtype == torch.int64
        assert torch.equal(targets, inputs + 1)
        seen += targets.flatten().tolist()
    assert len(set(seen)) == len(seen) == 80
