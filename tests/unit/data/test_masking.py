"""Which tokens are hidden, how often, behind what; and that only seed and number decide it."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from moetrain.config.objectives import MaskedLMConfig
from moetrain.data.loader import BatchLoader, unigram_entropy
from moetrain.data.masking import MaskedDataset
from moetrain.errors import DataError

VOCAB, LENGTH, MASK, EOD = 50, 40, 4, 2
TOKENIZER = SimpleNamespace(vocab_size=VOCAB, eod=EOD, bos=1, pad=3, mask=MASK)


@dataclass(frozen=True)
class Corpus:
    """Random sequences with special tokens in them."""

    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index % 100)  # a text comes again a hundred numbers later
        tokens = torch.randint(0, VOCAB, (LENGTH,), generator=generator)
        return {"tokens": tokens, "labels": tokens.roll(-1)}


def masked(size: int = 400, seed: int = 7, stream: int = 0, **settings: float) -> MaskedDataset:
    return MaskedDataset(Corpus(size), MaskedLMConfig(**settings), TOKENIZER, seed, stream)  # pyright: ignore


def stacked(dataset: MaskedDataset, key: str) -> torch.Tensor:
    return torch.stack([dataset[i][key] for i in range(len(dataset))])


def test_the_share_of_ordinary_tokens_is_exact_and_special_ones_are_never_predicted() -> None:
    dataset = masked()
    for index in range(50):
        sample, original = dataset[index], Corpus(400)[index]["tokens"]
        special = torch.isin(original, torch.tensor([1, 2, 3, 4]))
        assert torch.equal(sample["labels"], original)
        assert not sample["weights"][special].any()
        assert sample["weights"].sum() == round(0.15 * int((~special).sum()))
        assert torch.equal(sample["tokens"][sample["weights"] == 0], original[sample["weights"] == 0])


def test_of_the_predicted_tokens_80_in_100_are_masked_10_random_and_10_as_they_were() -> None:
    """BERT, section 3.1. A random token is by chance the old one at one in 46, and never a special one."""
    dataset = masked(2000)
    tokens, labels, weights = (stacked(dataset, key) for key in ("tokens", "labels", "weights"))
    predicted = weights > 0
    seen, truth = tokens[predicted], labels[predicted]
    masks = (seen == MASK).double().mean().item()
    kept = (seen == truth).double().mean().item()
    assert predicted.sum() > 10000
    assert masks == pytest.approx(0.8, abs=0.015)
    assert kept == pytest.approx(0.1 + 0.1 / 46, abs=0.012)
    replaced = seen[(seen != MASK) & (seen != truth)]
    assert not torch.isin(replaced, torch.tensor([1, 2, 3])).any()
    assert len(replaced.unique()) == 46


def test_settings_of_the_shares_are_obeyed() -> None:
    tokens, weights = (
        stacked(masked(share=0.5, mask_share=0.0, random_share=0.0), key) for key in ("tokens", "weights")
    )
    assert torch.equal(tokens, stacked(masked(), "labels"))
    assert 0.4 < weights.mean() < 0.5
    with pytest.raises(ValidationError, match="must not exceed 1"):
        MaskedLMConfig(mask_share=0.8, random_share=0.3)


def test_a_sample_is_a_function_of_seed_stream_and_number() -> None:
    dataset, again = masked(), masked()
    for index in (250, 3, 3, 17):  # in any order, any number of times
        for key, value in dataset[index].items():
            assert torch.equal(value, again[index][key])
    assert not torch.equal(dataset[3]["weights"], masked(seed=8)[3]["weights"])
    assert not torch.equal(dataset[3]["weights"], masked(stream=1)[3]["weights"])


def test_a_text_that_comes_again_is_hidden_differently() -> None:
    dataset = masked()
    first, second = dataset[5], dataset[105]
    assert torch.equal(first["labels"], second["labels"])
    assert not torch.equal(first["weights"], second["weights"])


def test_every_layout_and_every_resume_reads_the_same_hidden_tokens() -> None:
    def steps(ranks: int, micro: int, consumed: int, count: int) -> list[torch.Tensor]:
        loaders = [BatchLoader(masked(), 8, micro, rank, ranks, consumed) for rank in range(ranks)]
        found = []
        for _ in range(count):
            parts = [next(loader) for loader in loaders]
            rows = [parts[rank][i] for i in range(8 // (micro * ranks)) for rank in range(ranks)]
            found.append(torch.cat([torch.stack([b.tokens, b.labels, b.weights.long()], -1) for b in rows]))  # pyright: ignore
        return found

    whole = torch.stack(steps(1, 1, 0, 4))
    assert torch.equal(torch.stack(steps(2, 2, 0, 4)), whole)
    assert torch.equal(torch.stack(steps(4, 1, 16, 2)), whole[2:])


def test_the_unigram_entropy_is_that_of_the_hidden_tokens() -> None:
    dataset = masked(100)
    hidden = torch.cat([dataset[i]["labels"][dataset[i]["weights"] > 0] for i in range(100)])
    share = hidden.bincount().double() / len(hidden)
    expected = -(share[share > 0] * share[share > 0].log()).sum().item()
    assert unigram_entropy(dataset, 100) == pytest.approx(expected)


def test_a_tokenizer_without_a_mask_token_is_refused() -> None:
    bare = SimpleNamespace(vocab_size=VOCAB, eod=EOD, bos=1, pad=3, mask=None)
    with pytest.raises(DataError, match="needs a mask token"):
        MaskedDataset(Corpus(1), MaskedLMConfig(), bare, 0, 0)  # pyright: ignore
