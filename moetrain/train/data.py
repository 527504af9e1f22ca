"""The data of a run: tokenizer, training and validation samples, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from moetrain.config.objectives import ClassifyConfig, MaskedLMConfig, RegressConfig
from moetrain.config.schema import RunConfig
from moetrain.data.dataset import build_datasets
from moetrain.data.examples import OrderedExamples, ShuffledExamples, read_examples
from moetrain.data.loader import SampleDataset, unigram_entropy
from moetrain.data.masking import MaskedDataset, mask_id
from moetrain.data.tokenizers import Tokenizer, load_tokenizer
from moetrain.errors import DataError


@dataclass(frozen=True)
class RunData:
    """`valid` is None without validation, and `unigram_entropy` (nats per token of the validation labels) also for
    sequence tasks. `valid_batches` is how many global batches a validation reads.

    `train` holds `train_iters` global batches. A run that resumes with another batch size may need more, and asks
    `train_of` for as many as it needs: the same stream, further. Collective, as `open_data`. `contents` tells the
    corpora from others under their paths; empty for sequence tasks.
    """

    train: SampleDataset
    train_of: Callable[[int], SampleDataset]
    valid: SampleDataset | None
    valid_batches: int
    tokenizer_fingerprint: str
    unigram_entropy: float | None
    contents: dict[str, str] = field(default_factory=dict)


def open_data(config: RunConfig, rank: int) -> RunData:
    """Load the tokenizer and build the datasets for all steps of the run. Collective over the default group.

    Raises:
        DataError: something is missing, damaged or does not fit; checked on every rank before any work starts.
    """
    training, objective = config.training, config.training.objective
    tokenizer = load_tokenizer(config.data.tokenizer)
    if isinstance(objective, ClassifyConfig | RegressConfig):
        return _open_examples(config, objective, tokenizer)
    if isinstance(objective, MaskedLMConfig):
        mask_id(tokenizer)  # before minutes of indexing

    def build(train_samples: int, valid_samples: int) -> tuple[SampleDataset, SampleDataset | None, dict[str, str]]:
        datasets = build_datasets(
            config.data,
            config.model.seq_length,
            (train_samples, valid_samples, 0),
            training.seed,
            tokenizer,
            config.model.vocab_size,
            Path(config.data.cache_dir or Path(config.run.dir) / "data-cache"),
            scan_tokens=rank == 0,
        )
        train, valid = datasets.train, datasets.valid
        assert train is not None
        if not isinstance(objective, MaskedLMConfig):
            return train, valid, datasets.contents
        masked = MaskedDataset(train, objective, tokenizer, training.seed, stream=0)
        if valid is not None:
            valid = MaskedDataset(valid, objective, tokenizer, training.seed, stream=1)
        return masked, valid, datasets.contents

    valid_samples = training.eval_iters * training.global_batch_size
    train, valid, contents = build(training.train_iters * training.global_batch_size, valid_samples)
    entropy = unigram_entropy(valid, valid_samples) if valid is not None else None
    return RunData(
        train, lambda n: build(n, 0)[0], valid, training.eval_iters, tokenizer.fingerprint, entropy, contents
    )


def _open_examples(config: RunConfig, objective: ClassifyConfig | RegressConfig, tokenizer: Tokenizer) -> RunData:
    model, training = config.model, config.training
    assert model.head is not None
    if tokenizer.vocab_size > model.vocab_size:
        raise DataError(
            f"model.vocab_size ({model.vocab_size}) must be at least data.tokenizer's vocabulary "
            f"({tokenizer.vocab_size})"
        )
    how = (objective, tokenizer, model.seq_length, model.head.pooling == "first")
    train = read_examples([Path(entry.path) for entry in config.data.train], *how)

    def shuffled(samples: int) -> SampleDataset:
        return ShuffledExamples(train, samples, training.seed)

    samples = shuffled(training.train_iters * training.global_batch_size)
    if not training.eval_iters:
        return RunData(samples, shuffled, None, 0, tokenizer.fingerprint, None)
    valid = read_examples([Path(entry.path) for entry in config.data.valid], *how)
    ordered = OrderedExamples(valid, training.global_batch_size)
    return RunData(samples, shuffled, ordered, ordered.batches, tokenizer.fingerprint, None)
