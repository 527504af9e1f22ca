"""The data of a run: tokenizer, training and validation samples, and what they are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moetrain.config.objectives import MaskedLMConfig
from moetrain.config.schema import RunConfig
from moetrain.data.dataset import build_datasets
from moetrain.data.loader import SampleDataset, unigram_entropy
from moetrain.data.masking import MaskedDataset, mask_id
from moetrain.data.tokenizers import load_tokenizer


@dataclass(frozen=True)
class RunData:
    """`valid` is None without validation, and `unigram_entropy` (nats per token of the validation labels) also for
    sequence tasks. `valid_batches` is how many global batches a validation reads."""

    train: SampleDataset
    valid: SampleDataset | None
    valid_batches: int
    tokenizer_fingerprint: str
    unigram_entropy: float | None


def open_data(config: RunConfig, rank: int) -> RunData:
    """Load the tokenizer and build the datasets for all steps of the run. Collective over the default group.

    Raises:
        DataError: something is missing, damaged or does not fit; checked on every rank before any work starts.
    """
    training, objective = config.training, config.training.objective
    tokenizer = load_tokenizer(config.data.tokenizer)
    if isinstance(objective, MaskedLMConfig):
        mask_id(tokenizer)  # before minutes of indexing
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
    train, valid = datasets.train, datasets.valid
    assert train is not None
    if isinstance(objective, MaskedLMConfig):
        train = MaskedDataset(train, objective, tokenizer, training.seed, stream=0)
        valid = MaskedDataset(valid, objective, tokenizer, training.seed, stream=1) if valid is not None else None
    entropy = unigram_entropy(valid, valid_samples) if valid is not None else None
    return RunData(train, valid, training.eval_iters, tokenizer.fingerprint, entropy)
