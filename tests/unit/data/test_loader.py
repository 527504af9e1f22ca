from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.data.loader import BatchLoader, global_batch_indices, rank_indices, unigram_entropy
from moetrain.errors import DataError, LayoutError


class Numbered:
    """Sample n holds the number n, so a batch tells which samples it is made of."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return {"tokens": torch.full((3,), index), "labels": torch.full((3,), index + 1)}


@given(
    consumed=st.integers(0, 10**12),
    micro=st.integers(1, 8),
    ranks=st.integers(1, 64),
    per_rank=st.integers(1, 8),
)
def test_the_ranks_read_the_global_batch_exactly_once(consumed: int, micro: int, ranks: int, per_rank: int):
    size = micro * ranks * per_rank
    parts = [rank_indices(consumed, size, micro, rank, ranks) for rank in range(ranks)]
    assert sorted(i for part in parts for group in part for i in group) == list(global_batch_indices(consumed, size))
    assert all(len(part) == per_rank and all(len(group) == micro for group in part) for part in parts)


def test_micro_batches_are_the_same_for_any_number_of_ranks():
    def groups(ranks: int) -> list[list[int]]:
        return sorted(group for rank in range(ranks) for group in rank_indices(16, 16, 2, rank, ranks))

    assert groups(1) == groups(2) == groups(4) == groups(8) == [[n, n + 1] for n in range(16, 32, 2)]


@pytest.mark.parametrize(("size", "micro", "rank", "ranks"), [(8, 3, 0, 1), (8, 2, 0, 3), (8, 2, 2, 2), (8, 2, -1, 2)])
def test_sizes_that_do_not_divide_and_ranks_that_do_not_exist_are_refused(size: int, micro: int, rank: int, ranks: int):
    with pytest.raises(LayoutError, match="must be"):
        rank_indices(0, size, micro, rank, ranks)
    with pytest.raises(LayoutError, match="must be"):
        BatchLoader(Numbered(8), size, micro, rank, ranks)


@settings(deadline=None)
@given(
    parts=st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=5
    ),
    prefetch=st.integers(0, 2),
)
def test_no_change_of_ranks_and_batch_sizes_repeats_or_skips_a_sample(
    parts: list[tuple[int, int, int, int]], prefetch: int
):
    """Each part of the run goes on from what the one before had consumed: ranks, micro-batch, micro-batches, steps."""
    consumed, read = 0, []
    for ranks, micro, per_rank, steps in parts:
        batch = ranks * micro * per_rank
        loaders = [BatchLoader(Numbered(10**4), batch, micro, r, ranks, consumed, prefetch) for r in range(ranks)]
        for _ in range(steps):
            read += sorted(int(n) for loader in loaders for m in next(loader) for n in m.tokens[:, 0])
        assert {loader.consumed_samples for loader in loaders} == {consumed + steps * batch}
        consumed += steps * batch
        for loader in loaders:
            loader.close()
    assert read == list(range(consumed))


def _stream(ranks: int, steps: int, consumed: int = 0, prefetch: int = 0) -> list[list[int]]:
    """Samples of each step, from all ranks, in the order of micro-batches."""
    loaders = [BatchLoader(Numbered(100), 8, 2, rank, ranks, consumed, prefetch) for rank in range(ranks)]
    stream = []
    for _ in range(steps):
        parts = [next(loader) for loader in loaders]
        rows = [micro for group in zip(*parts, strict=True) for micro in group]
        stream.append(torch.cat([micro.tokens[:, 0] for micro in rows]).tolist())
        assert all(torch.equal(micro.labels, micro.tokens + 1) and micro.tokens.shape == (2, 3) for micro in rows)
    for loader in loaders:
        loader.close()
    return stream


def test_the_stream_does_not_change_with_the_number_of_ranks():
    assert _stream(1, 5) == _stream(2, 5) == _stream(4, 5) == [list(range(8 * n, 8 * n + 8)) for n in range(5)]


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_a_run_resumed_with_other_ranks_goes_on_where_it_stopped(prefetch: int):
    assert _stream(1, 3) + _stream(4, 2, consumed=24, prefetch=prefetch) == _stream(2, 5, prefetch=prefetch)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_consumed_samples_counts_what_was_handed_out_over_all_ranks(prefetch: int):
    with BatchLoader(Numbered(100), 8, 2, data_rank=1, data_size=2, consumed_samples=16, prefetch=prefetch) as loader:
        assert loader.consumed_samples == 16
        next(loader)
        assert loader.consumed_samples == 24
        assert len(loader) == (100 - 24) // 8


@pytest.mark.parametrize("prefetch", [0, 2])
def test_the_end_of_the_dataset_is_an_error_and_not_a_new_beginning(prefetch: int):
    with BatchLoader(Numbered(20), 8, 2, 0, 1, prefetch=prefetch) as loader:
        assert [len(next(loader)) for _ in range(2)] == [4, 4]
        with pytest.raises(DataError, match="holds 20 samples; the step from sample 16 needs 8"):
            next(loader)
        assert loader.consumed_samples == 16


def test_an_error_of_the_reading_thread_reaches_the_step_that_needs_the_sample():
    class Broken(Numbered):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            if index == 9:
                raise OSError("disk")
            return super().__getitem__(index)

    with BatchLoader(Broken(100), 8, 2, 0, 1, prefetch=2) as loader:
        next(loader)
        with pytest.raises(OSError, match="disk"):
            next(loader)


class Labels:
    def __init__(self, *rows: list[int]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"tokens": torch.zeros(len(self.rows[index])), "labels": torch.tensor(self.rows[index])}


def test_unigram_entropy_is_that_of_the_labels_own_distribution():
    assert unigram_entropy(Labels([5, 5, 5]), 10) == 0
    assert unigram_entropy(Labels([0, 1, 2, 3], [3, 2, 1, 0]), 10) == pytest.approx(math.log(4))
    half_quarter_quarter = 0.5 * math.log(2) + 0.5 * math.log(4)
    assert unigram_entropy(Labels([7, 7], [8, 9]), 10) == pytest.approx(half_quarter_quarter)
    assert unigram_entropy(Labels([7, 7], [8, 9]), 1) == 0


def test_unigram_entropy_of_nothing_is_an_error():
    with pytest.raises(DataError, match="no held-out label"):
        unigram_entropy(Labels(), 10)
