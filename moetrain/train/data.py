"""The data of a run: tokenizer, training and validation samples, and what they are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moetrain.config.schema import RunConfig
from moetrain.data.dataset import build_datasets
from moetrain.data.loader import SampleDataset, unigram_entropy
from moetrain.data.tokenizers import load_tokenizer


@dataclass(frozen=True)
class RunData:
    """`valid` and `unigram_entropy` (nats per token of the validation labels) are None without validation."""

    train: SampleDataset
    valid: SampleDataset | None
    tokenizer_fingerprint: str
    unigram_entropy: float | None


def open_data(config: RunConfig, rank: int) -> RunData:
    """Load the tokenizer and build the datasets for all steps of the run. Collective over the default group.

    Raises:
        DataError: something is missing, damaged or does not fit; checked on every rank before any work starts.
    """
    training = config.training
    tokenizer = load_tokenizer(config.data.tokenizer)
    valid_samples = training.eval_iters * training.global_batch_size
    datasets = build_datasets(
        config.data,
        config.model.seq_length,
        (training.train_iters * training.global_batch_size, valid_samples, 0),
        training.seed,
        tokenizer,
        config.model.vocab_size,
        Path(config.data.cache_dir or Path(config.run.dir) / "data-cache"),
        scan_tokens=rank == 0,
    )
    assert datasets.train is not None
    entropy = unigram_entropy(datasets.valid, valid_samples) if datasets.valid is not None else None
    return RunData(datasets.train, datasets.valid, tokenizer.fingerprint, entropy)
