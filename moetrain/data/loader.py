"""From a dataset to the micro-batches of one rank. The only state is the number of samples consumed.

Step n of a run reads samples [n*G, (n+1)*G) for global batch size G, however many ranks share them, so a run may go on
with another number of ranks and read the same stream.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from math import log
from typing import Protocol, Self

import torch

from moetrain.errors import DataError, LayoutError


class SampleDataset(Protocol):
    """Sequences by number. A sample holds the parts of a `MicroBatch` that are not None, each for one sequence."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]: ...


@dataclass(frozen=True)
class MicroBatch:
    """What the model reads and must tell, in host memory; B sequences of S tokens.

    Attributes:
        tokens: int64 [B, S].
        labels: int64 [B, S]: the tokens one ahead (causal) or those that were hidden (masked); of sequence tasks [B],
            int64 classes or fp32 scores.
        weights: fp32, shaped as the labels: 1 where a label counts in the loss, 0 where not. None: all count.
        valid: bool [B, S], True = a real token, which come first; False = padding. None: no padding.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor | None = None
    valid: torch.Tensor | None = None


def global_batch_indices(consumed: int, global_batch_size: int) -> range:
    """Samples of the next step, by number."""
    return range(consumed, consumed + global_batch_size)


def rank_indices(
    consumed: int, global_batch_size: int, micro_batch_size: int, data_rank: int, data_size: int
) -> list[list[int]]:
    """Samples of the next step for one data-parallel rank, by micro-batch.

    The global batch is cut into micro-batches in order, dealt out like cards. The ranks' parts are disjoint, of one
    size, and together the global batch; each micro-batch is the same for every `data_size`.

    Errors: LayoutError unless micro_batch_size x data_size divides global_batch_size and the rank is one of them.
    """
    if global_batch_size % (micro_batch_size * data_size):
        raise LayoutError(
            f"training.global_batch_size ({global_batch_size}) must be divisible by training.micro_batch_size x "
            f"data-parallel ranks ({micro_batch_size} x {data_size})"
        )
    if not 0 <= data_rank < data_size:
        raise LayoutError(f"data-parallel rank {data_rank} must be at least 0 and below {data_size}")
    batch = global_batch_indices(consumed, global_batch_size)
    starts = range(data_rank * micro_batch_size, global_batch_size, data_size * micro_batch_size)
    return [list(batch[start : start + micro_batch_size]) for start in starts]


class BatchLoader:
    """Iterator over steps; each step is this rank's list of `MicroBatch`.

    `prefetch` steps are read ahead by a thread, 0 reads when asked. `consumed_samples` counts, over all ranks, the
    samples of the steps that were handed out, so it is what a checkpoint keeps, whatever was read ahead. Communication:
    none. Close it, or use it in a `with` block, to end the thread.

    Errors: LayoutError as `rank_indices`; DataError when asked for a step beyond the end of the dataset, which is never
    started again silently.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        global_batch_size: int,
        micro_batch_size: int,
        data_rank: int,
        data_size: int,
        consumed_samples: int = 0,
        prefetch: int = 0,
    ) -> None:
        rank_indices(0, global_batch_size, micro_batch_size, data_rank, data_size)  # refuse bad sizes now
        self._dataset = dataset
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._data_rank, self._data_size = data_rank, data_size
        self._consumed = self._requested = consumed_samples
        self._prefetch = prefetch
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches") if prefetch else None
        self._ahead: deque[Future[list[MicroBatch]]] = deque()

    @property
    def consumed_samples(self) -> int:
        """Samples of all steps handed out so far, over all ranks, with those before this loader was made."""
        return self._consumed

    def __len__(self) -> int:
        """Whole steps that are left."""
        return max(0, len(self._dataset) - self._consumed) // self._global_batch_size

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        if len(self) == 0:
            raise DataError(
                f"the dataset holds {len(self._dataset)} samples; the step from sample {self._consumed} needs "
                f"{self._global_batch_size} (build it for all steps of the run)"
            )
        step = self._read(self._consumed) if self._pool is None else self._take(self._pool)
        self._consumed += self._global_batch_size
        return step

    def _take(self, pool: ThreadPoolExecutor) -> list[MicroBatch]:
        """Order reads up to `prefetch` steps beyond the next one, and wait for that one."""
        horizon = min(
            self._consumed + self._prefetch * self._global_batch_size, len(self._dataset) - self._global_batch_size
        )
        while self._requested <= horizon:
            self._ahead.append(pool.submit(self._read, self._requested))
            self._requested += self._global_batch_size
        return self._ahead.popleft().result()

    def _read(self, consumed: int) -> list[MicroBatch]:
        groups = rank_indices(
            consumed, self._global_batch_size, self._micro_batch_size, self._data_rank, self._data_size
        )
        return [self._micro_batch(group) for group in groups]

    def _micro_batch(self, indices: list[int]) -> MicroBatch:
        samples = [self._dataset[index] for index in indices]
        parts = (part.name for part in fields(MicroBatch) if part.name in samples[0])
        return MicroBatch(**{name: torch.stack([sample[name] for sample in samples]) for name in parts})

    def close(self) -> None:
        """End the reading thread; the loader gives no further step."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def unigram_entropy(dataset: SampleDataset, max_samples: int) -> float:
    """Entropy of the labels' own unigram distribution, in nats per token: H = - sum_v (c_v / N) ln(c_v / N).

    c_v counts token v among the N labels of the first `max_samples` samples (or of all, if fewer). No model that
    ignores context can have a lower mean loss on these labels, so a loss below H shows that the context is used. Labels
    of weight 0 do not count.

    Errors: DataError when there is no sample.
    """
    counts: Counter[int] = Counter()
    for index in range(min(max_samples, len(dataset))):
        sample = dataset[index]
        counted = sample["labels"][sample["weights"] > 0] if "weights" in sample else sample["labels"]
        values, occurrences = counted.unique(return_counts=True)
        counts.update(dict(zip(values.tolist(), occurrences.tolist(), strict=True)))
    total = counts.total()
    if total == 0:
        raise DataError(f"no held-out label to measure: {len(dataset)} samples, max_samples {max_samples}")
    return -sum(count / total * log(count / total) for count in counts.values())
