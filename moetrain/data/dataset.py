"""Blended, shuffled training sequences over Megatron's datasets, in an order that never depends on how much is asked.

Megatron shuffles all epochs of a run together, so its order changes with the number of samples, and a run that is
prolonged reads another stream. `EpochGPTDataset` replaces only that: each epoch has its own permutation, a function of
(seed, epoch). Megatron still cuts the sequences, maps the files and blends the corpora.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy
from megatron.core.datasets import helpers
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset

from moetrain.config.schema import BlendEntry, DataConfig
from moetrain.data.atomic import staged
from moetrain.data.index import Index, content_of, verify_prefix
from moetrain.data.loader import SampleDataset
from moetrain.data.tokenizers import Tokenizer
from moetrain.errors import DataError

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
CACHE_FORMAT = 1


@dataclass(frozen=True)
class Datasets:
    """The three splits; None where no sample was asked for. `contents`: of every corpus what tells it from another one
    under its path (see `content_of`)."""

    train: SampleDataset | None
    valid: SampleDataset | None
    test: SampleDataset | None
    contents: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _MegatronTokenizer:
    """What GPTDataset asks of a tokenizer. It has no `pad` on purpose: Megatron rewrites tokens with that id to 0."""

    vocab_size: int
    eod: int
    unique_identifiers: dict[str, str]


def build_datasets(
    config: DataConfig,
    model_seq_length: int,
    sizes: tuple[int, int, int],
    seed: int,
    tokenizer: Tokenizer,
    vocab_size: int,
    cache_dir: Path,
    scan_tokens: bool = True,
) -> Datasets:
    """Datasets of at least `sizes` (train, valid, test) samples of `model_seq_length` tokens; 0 builds none.

    A sample is a function of (corpora, seed, its number): not of `sizes`, the ranks, or what was read before. Corpora
    that are shorter than asked are read again, in a new order each epoch. Without `config.valid`, `config.split` cuts
    each training corpus by documents, in file order. Sequences run across documents, as in Megatron.

    Communication: with torch.distributed initialized this is collective over the default group (Megatron's barriers:
    rank 0 fills `cache_dir` first); without, none. Corpora are checked before the first barrier, on every rank.
    `scan_tokens` may be turned off on all ranks but one: only corpora without a sidecar are scanned.

    Errors: DataError for a corpus that is damaged or does not fit (see `verify_prefix`), too short for one sequence, or
    in both train and valid; and for a cache that cannot be written.
    """
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"model.vocab_size ({vocab_size}) must be at least data.tokenizer's vocabulary ({tokenizer.vocab_size})"
        )
    _refuse_overlap(config)
    if not any(sizes):
        return Datasets(None, None, None)
    verified = {
        entry.path: verify_prefix(entry.path, tokenizer, vocab_size, scan_tokens)
        for entry in (*config.train, *config.valid)
    }
    megatron = _megatron_config(config, model_seq_length, sizes, seed, tokenizer, cache_dir)
    for split, size in enumerate(sizes):
        for path, begin, end in _document_ranges(config, megatron, split) if size else ():
            _check_room(verified[path][0], begin, end, model_seq_length, SPLITS[split])
    _make_cache_dir(cache_dir)
    with _quiet("megatron.core.datasets.blended_dataset"):
        built = BlendedMegatronDatasetBuilder(EpochGPTDataset, list(sizes), lambda: True, megatron).build()
    splits = (dataset if size else None for dataset, size in zip(built, sizes, strict=True))
    return Datasets(*splits, {path: content_of(*corpus) for path, corpus in verified.items()})  # pyright: ignore


class EpochGPTDataset(GPTDataset):
    """Megatron's GPTDataset with an order that is a function of (seed, epoch, number) alone.

    An epoch's documents are permuted and laid behind those of the epoch before; sequence k is tokens
    [k*seq_length, (k+1)*seq_length] of that stream. The sequences that end in an epoch are permuted among themselves.
    Asking for more samples therefore adds epochs behind, and moves nothing.
    """

    def _build_document_sample_shuffle_indices(self) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        assert isinstance(self.dataset, IndexedDataset) and isinstance(self.config, EpochGPTDatasetConfig)
        lengths = self.dataset.sequence_lengths[self.indices]
        tokens = int(lengths.sum(dtype=numpy.int64))
        epochs = epochs_needed(self.num_samples or 0, self.config.sequence_length, tokens)
        logger.info("%s %s: %s samples, %d epochs", self.dataset_path, self.index_split.name, self.num_samples, epochs)
        identity = {
            "format": CACHE_FORMAT,
            "lengths": hashlib.sha256(lengths.tobytes()).hexdigest(),
            "first": int(self.indices[0]),
            "sequence_length": self.config.sequence_length,
            "seed": self.config.random_seed,
            "epochs": epochs,
        }
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
        folder = Path(self.config.epoch_cache) / f"order-{key}"
        if not folder.is_dir():
            _save(folder, self._build(self.dataset.sequence_lengths, tokens, epochs))
        return _load(folder)

    def _build(self, lengths: numpy.ndarray, tokens: int, epochs: int) -> dict[str, numpy.ndarray]:
        seed, size = self.config.random_seed, self.config.sequence_length
        documents = numpy.concatenate([_random(seed, e, 0).permutation(self.indices) for e in range(epochs)])
        documents = documents.astype(numpy.int32, copy=False)
        samples = helpers.build_sample_idx(numpy.array(lengths), documents, size, epochs, tokens)
        ends = [0, *((tokens * (e + 1) - 1) // size for e in range(epochs))]
        blocks = [_random(seed, e, 1).permutation(numpy.arange(ends[e], ends[e + 1])) for e in range(epochs)]
        return {"document": documents, "sample": samples, "shuffle": numpy.concatenate(blocks)}


@dataclass
class EpochGPTDatasetConfig(GPTDatasetConfig):
    """Megatron's configuration and the folder of the cached orders.

    Megatron's own `path_to_cache` stays unset: its cache is keyed by path, so a corpus that was made anew would meet an
    old order; it is not written atomically; and it is read with pickles allowed. What that costs: a blend's table, ten
    bytes a sample, is in each process's memory.
    """

    epoch_cache: str = ""


def epochs_needed(samples: int, seq_length: int, tokens_per_epoch: int) -> int:
    """Epochs, at least 1, that hold `samples` sequences of seq_length tokens and the token after the last."""
    return max(1, -(-(samples * seq_length + 1) // tokens_per_epoch))


def _random(seed: int, epoch: int, purpose: int) -> numpy.random.RandomState:
    """RandomState rather than Generator, because numpy promises that its permutations never change."""
    return numpy.random.RandomState(numpy.random.MT19937(numpy.random.SeedSequence([seed, epoch, purpose])))


def _save(folder: Path, arrays: dict[str, numpy.ndarray]) -> None:
    try:
        with staged(folder) as (draft,):
            draft.mkdir()
            for name, array in arrays.items():
                numpy.save(draft / f"{name}.npy", array, allow_pickle=False)
    except DataError:
        if not folder.is_dir():  # else another process came first, with the same bytes
            raise


def _load(folder: Path) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    try:
        document, sample, shuffle = (
            numpy.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("document", "sample", "shuffle")
        )
    except (OSError, ValueError) as error:
        raise DataError(f"data cache {folder} is damaged ({error}): delete it, it will be built again") from error
    return document, sample, shuffle


def _megatron_config(
    config: DataConfig, seq_length: int, sizes: tuple[int, int, int], seed: int, tokenizer: Tokenizer, cache_dir: Path
) -> EpochGPTDatasetConfig:
    own_valid = bool(config.valid)
    split = ",".join(f"{float(share):f}" for share in config.split.split(","))  # Megatron does not read 9e1
    megatron = EpochGPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=None if own_valid else _blend(config.train),
        blend_per_split=[_blend(config.train) if sizes[0] else None, _blend(config.valid) if sizes[1] else None, None]
        if own_valid
        else None,
        split=None if own_valid else split,
        mmap_bin_files=True,
        tokenizer=_MegatronTokenizer(  # pyright: ignore[reportArgumentType]
            tokenizer.vocab_size, tokenizer.eod, {"fingerprint": tokenizer.fingerprint}
        ),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,  # causality is implicit; a mask would be seq_length squared per sample
        epoch_cache=str(cache_dir),
    )
    if megatron.split_matrix is not None:  # a split of which nothing is asked need not have room for a sequence
        cuts = zip(megatron.split_matrix, sizes, strict=True)
        megatron.split_matrix = [cut if size else None for cut, size in cuts]  # pyright: ignore
    return megatron


def _blend(entries: Sequence[BlendEntry]) -> tuple[list[str], list[float] | None]:
    """Paths and weights; without weights for a single corpus, which needs no blending."""
    weights = [entry.weight for entry in entries]
    return [entry.path for entry in entries], weights if len(entries) > 1 else None


def _document_ranges(
    config: DataConfig, megatron: EpochGPTDatasetConfig, split: int
) -> Iterator[tuple[str, float, float]]:
    """(path, begin, end) of the corpora of a split, as shares of their sequences.

    Errors: DataError when samples are asked of a split that has no share.
    """
    if config.valid:
        entries, cut = (config.train, config.valid, [])[split], (0.0, 1.0)
    else:
        assert megatron.split_matrix is not None, "Megatron sets it whenever it is given a split"
        entries, cut = config.train, megatron.split_matrix[split]
    if not entries or cut is None:
        source = "data.valid is given, which leaves none" if config.valid else f"data.split is {config.split!r}"
        raise DataError(f"{SPLITS[split]} samples are asked for, but {source}")
    for entry in entries:
        yield entry.path, *cut


def _check_room(index: Index, begin: float, end: float, seq_length: int, split: str) -> None:
    """Refuse a share of a corpus that does not hold one sequence and the token after it."""
    count = len(index.lengths)
    first, last = round(begin * count), round(end * count)  # as BlendedMegatronDatasetBuilder rounds
    tokens = int(index.lengths[first:last].sum(dtype=numpy.int64))
    if tokens < seq_length + 1:
        raise DataError(
            f"corpus {index.prefix}: its {split} share, {last - first} of {count} documents, holds {tokens} tokens; "
            f"one sequence needs model.seq_length + 1 = {seq_length + 1}"
        )


def _refuse_overlap(config: DataConfig) -> None:
    both = {os.path.realpath(e.path) for e in config.train} & {os.path.realpath(e.path) for e in config.valid}
    if both:
        raise DataError(f"data.train and data.valid both hold {', '.join(sorted(both))}: validation must be held out")


def _make_cache_dir(cache_dir: Path) -> None:
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"data.cache_dir {cache_dir}: cannot be made ({error.strerror})") from error


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep Megatron from warning that the cache which we leave unset on purpose is unset."""
    target = logging.getLogger(name)
    level = target.level
    target.setLevel(logging.ERROR)
    try:
        yield
    finally:
        target.setLevel(level)
