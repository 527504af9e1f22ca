"""What a checkpoint needs of the other ranks: to gather and broadcast JSON, and to fail together.

torch.distributed's own object collectives unpickle what arrives; these send JSON bytes in uint8 tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.errors import CheckpointError


class Comm(Protocol):
    """The ranks that save and load together. Every method but the two numbers is a collective."""

    @property
    def rank(self) -> int:
        """Number of this rank within the group."""
        ...

    @property
    def world_size(self) -> int:
        """Number of ranks in the group."""
        ...

    def gather_objects(self, value: Any) -> list[Any] | None:
        """Every rank's JSON value, in rank order, on rank 0; None elsewhere."""
        ...

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's JSON value, on every rank."""
        ...


class SingleProcess:
    """A world of one, without torch.distributed."""

    rank = 0
    world_size = 1

    def gather_objects(self, value: Any) -> list[Any]:
        """The value, as JSON would give it back."""
        return [json.loads(json.dumps(value))]

    def broadcast_object(self, value: Any) -> Any:
        """The value, as JSON would give it back."""
        return json.loads(json.dumps(value))


class TorchDistributed:
    """A process group (default: the world) on gloo or NCCL."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group if group is not None else dist.group.WORLD
        self.rank = dist.get_rank(self.group)
        self.world_size = dist.get_world_size(self.group)
        on_cpu = "gloo" in dist.get_backend(self.group)
        self._device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())

    def gather_objects(self, value: Any) -> list[Any] | None:
        """Every rank's JSON value on rank 0. Sends world_size x the longest encoding to rank 0."""
        data = self._encode(value)
        sizes = torch.empty(self.world_size, dtype=torch.int64, device=self._device)
        mine = torch.tensor([data.numel()], dtype=torch.int64, device=self._device)
        dist.all_gather_into_tensor(sizes, mine, group=self.group)
        lengths = sizes.tolist()
        padded = torch.zeros(max(lengths), dtype=torch.uint8, device=self._device)
        padded[: data.numel()] = data
        rows = [torch.empty_like(padded) for _ in lengths] if self.rank == 0 else None
        dist.gather(padded, rows, group=self.group, group_dst=0)
        return None if rows is None else [_decode(row[:n]) for row, n in zip(rows, lengths, strict=True)]

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's JSON value on every rank. Other ranks' values are ignored."""
        data = self._encode(value if self.rank == 0 else None)
        size = torch.tensor([data.numel()], dtype=torch.int64, device=self._device)
        dist.broadcast(size, group=self.group, group_src=0)
        buffer = data if self.rank == 0 else torch.empty(int(size), dtype=torch.uint8, device=self._device)
        dist.broadcast(buffer, group=self.group, group_src=0)
        return _decode(buffer)

    def _encode(self, value: Any) -> Tensor:
        return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self._device)


def _decode(data: Tensor) -> Any:
    return json.loads(data.cpu().numpy().tobytes())


@contextmanager
def together(comm: Comm, action: str) -> Iterator[None]:
    """Run a local block on every rank; when any rank's block raised, every rank raises CheckpointError.

    The message names every failed rank and its reason. The block must hold no collective: a rank that raised before
    it would leave the others waiting. Ends with a barrier.
    """
    failure: Exception | None = None
    try:
        yield
    # Whatever it is: the other ranks must not wait for this one until the timeout.
    except Exception as error:
        failure = error
    reasons = comm.gather_objects(None if failure is None else _reason(failure))
    verdict = None
    if reasons is not None and any(reasons):
        told = "; ".join(
            f"rank {rank}: {reason}" if comm.world_size > 1 else reason for rank, reason in enumerate(reasons) if reason
        )
        verdict = f"could not {action}: {told}"
    verdict = comm.broadcast_object(verdict)
    if verdict is not None:
        raise CheckpointError(verdict) from failure


def _reason(error: Exception) -> str:
    """A deliberate error speaks for itself; any other is told with its type."""
    text = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
    return text[:2000] or type(error).__name__
