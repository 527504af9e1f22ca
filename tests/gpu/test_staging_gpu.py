"""Staging from an accelerator: page-locked memory, and the values of the moment."""

from __future__ import annotations

import threading
from dataclasses import replace

import torch

from moetrain.checkpoint import Piece, StagingBuffer


def test_pieces_on_the_gpu_are_staged_in_page_locked_memory_as_they_were() -> None:
    state = torch.arange(1_000_000, dtype=torch.float32, device="cuda")
    host = torch.arange(7, dtype=torch.uint8)
    buffer = StagingBuffer()
    for start in (0.0, 5.0):
        state.copy_(torch.arange(start, start + 1_000_000, device="cuda"))
        steady = replace(Piece.whole("steady", state), steady=True)
        share = buffer.stage([Piece.whole("w", state), Piece.whole("rng.0", host), steady])
        thread = threading.Thread(target=share.finish)
        thread.start()
        thread.join()
        state.zero_()
        staged = share.pieces
        assert all(piece.tensor.is_pinned() and not piece.tensor.is_cuda for piece in staged)
        assert torch.equal(staged[2].tensor, staged[0].tensor)
        assert torch.equal(staged[0].tensor, torch.arange(start, start + 1_000_000))
        assert torch.equal(staged[1].tensor, host)


def test_a_buffer_that_began_on_the_host_is_replaced_when_a_gpu_takes_part() -> None:
    buffer = StagingBuffer()
    buffer.stage([Piece.whole("w", torch.ones(100))])
    staged = buffer.stage([Piece.whole("w", torch.ones(10, device="cuda"))]).pieces
    assert staged[0].tensor.is_pinned() and buffer.nbytes == 64
