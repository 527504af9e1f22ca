"""What an encoding process does. Imports neither torch nor Megatron: a process starts in a fraction of a second."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import connection, get_context, parent_process
from typing import Literal

import numpy

from moetrain.config.schema import TokenizerConfig
from moetrain.data.documents import Block, parse_block
from moetrain.data.tokenizers import Tokenizer, load_tokenizer
from moetrain.errors import DataError

BLOCKS_IN_FLIGHT_PER_WORKER = 3


@dataclass(frozen=True)
class EncodeJob:
    """What is the same for every block of a run."""

    tokenizer: TokenizerConfig
    fingerprint: str
    append_eod: bool
    json_key: str
    dtype: str


@dataclass(frozen=True)
class EncodedBlock:
    """Token ids [tokens] of a block's documents one after another, and the length of each; empty documents are left out
    and counted."""

    ids: numpy.ndarray
    lengths: list[int]
    empty: int
    nbytes: int


def encode_blocks(job: EncodeJob, blocks: Iterable[Block], workers: int) -> Iterator[EncodedBlock]:
    """Encode in the order of `blocks`, whatever the number of processes; one worker means this process.

    Memory: `BLOCKS_IN_FLIGHT_PER_WORKER` blocks a worker. Errors: DataError of the first bad block, or when an encoding
    process dies.
    """
    if workers == 1:
        yield from (encode_block(job, block) for block in blocks)
        return
    # spawn: a fork of a process in which torch runs threads may hang
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_follow_parent)
    waiting: deque[Future[EncodedBlock]] = deque()
    try:
        for block in blocks:
            waiting.append(pool.submit(encode_block, job, block))
            if len(waiting) >= workers * BLOCKS_IN_FLIGHT_PER_WORKER:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError("an encoding process died, perhaps for want of memory: try fewer workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def encode_block(job: EncodeJob, block: Block) -> EncodedBlock:
    """Parse and encode one block.

    Errors: DataError with file and line for a document that cannot be read.
    """
    tokenizer = _tokenizer(job.tokenizer.type, job.tokenizer.path, job.fingerprint)
    encoded = [tokenizer.encode(text) for text in parse_block(block, job.json_key)]
    documents = [ids for ids in encoded if ids]
    end = [tokenizer.eod] if job.append_eod else []
    ids = numpy.concatenate([numpy.empty(0, job.dtype), *(numpy.array(d + end, job.dtype) for d in documents)])
    lengths = [len(document) + len(end) for document in documents]
    return EncodedBlock(ids, lengths, len(encoded) - len(documents), block.nbytes)


@lru_cache(maxsize=1)
def _tokenizer(kind: Literal["sentencepiece", "huggingface"], path: str, fingerprint: str) -> Tokenizer:
    """The job's tokenizer, loaded once a process; the fingerprint guards against a file that changes under the run."""
    tokenizer = load_tokenizer(TokenizerConfig(type=kind, path=path))
    if tokenizer.fingerprint != fingerprint:
        raise DataError(f"tokenizer {path}: changed while the corpus was being prepared")
    return tokenizer


def _follow_parent() -> None:
    """Leave Ctrl-C to the parent, and end with it, even when it is killed: else this process would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None, "runs only in a pool's process"

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
