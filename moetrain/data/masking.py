"""Masked language modelling: which tokens of a sample are hidden, and behind what.

Source: BERT, arXiv 1810.04805, section 3.1 and appendix A.1, and its `create_pretraining_data.py`: a fixed share of the
positions, each replaced by the mask token, by a random token, or not at all.
"""

from __future__ import annotations

import numpy
import torch

from moetrain.config.objectives import MaskedLMConfig
from moetrain.data.loader import SampleDataset
from moetrain.data.tokenizers import Tokenizer, special_ids
from moetrain.errors import DataError

_PURPOSE = 0x6D61736B  # keeps these draws apart from others of the same seed and number


class MaskedDataset:
    """The sequences of another dataset with some tokens hidden.

    Sample n is a function of (seed, stream, n) and of the text alone: not of layout, process or what was read before.
    Numbers go on through the epochs, so a text that comes again is hidden differently (dynamic masking, RoBERTa, arXiv
    1907.11692, section 4.1).
    """

    def __init__(
        self, dataset: SampleDataset, config: MaskedLMConfig, tokenizer: Tokenizer, seed: int, stream: int
    ) -> None:
        """`stream` tells datasets of one run apart.

        Errors: DataError when the tokenizer has no mask token.
        """
        self.mask = mask_id(tokenizer)
        self.special = numpy.array(special_ids(tokenizer))
        self.ordinary = numpy.setdiff1d(numpy.arange(tokenizer.vocab_size), self.special)
        self._dataset, self._config, self._seed, self._stream = dataset, config, seed, stream

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`tokens` as the model sees them, `labels` as they were, `weights` 1 at the positions to predict."""
        original = self._dataset[index]["tokens"].numpy()
        # RandomState, because numpy promises that what it draws never changes.
        random = numpy.random.RandomState(
            numpy.random.MT19937(numpy.random.SeedSequence([self._seed, _PURPOSE, self._stream, index]))
        )
        chosen = self._choose(original, random)
        tokens = original.copy()
        fate = random.random_sample(len(chosen))
        replacement = self.ordinary[random.randint(len(self.ordinary), size=len(chosen))]
        masked = fate < self._config.mask_share
        shuffled = ~masked & (fate < self._config.mask_share + self._config.random_share)
        tokens[chosen[masked]] = self.mask
        tokens[chosen[shuffled]] = replacement[shuffled]
        weights = numpy.zeros(len(original), dtype=numpy.float32)
        weights[chosen] = 1.0
        return {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(original),
            "weights": torch.from_numpy(weights),
        }

    def _choose(self, tokens: numpy.ndarray, random: numpy.random.RandomState) -> numpy.ndarray:
        """Positions to predict: the share of those that hold text, rounded, and at least one if there is any."""
        candidates = numpy.flatnonzero(~numpy.isin(tokens, self.special))
        count = min(len(candidates), max(1, round(self._config.share * len(candidates))))
        return random.permutation(candidates)[:count]


def mask_id(tokenizer: Tokenizer) -> int:
    """The tokenizer's mask token.

    Errors: DataError when it has none.
    """
    if tokenizer.mask is None:
        raise DataError(
            "training.objective.type (masked_lm) needs a mask token, and data.tokenizer has none; train one with "
            "`moetrain data tokenizer --mask-token`, or name it as mask_token in a tokenizer_config.json"
        )
    return tokenizer.mask
