"""D5: the loss that training sees and the loss that decoding has, of a decoder whose routing looks at later tokens.

Training computes whole sequences, so the importance of a token by the attention that it receives depends on tokens
that are to be predicted. Decoding has only the tokens so far. For a causal router both are the same number.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from moetrain.checkpoint.folders import find_step_folder
from moetrain.checkpoint.reader import CheckpointReader
from moetrain.config.loader import config_from_dict
from moetrain.data.loader import BatchLoader
from moetrain.model.decoder import Decoder
from moetrain.model.reference_logits import reference_model
from moetrain.train.data import open_data


@dataclass(frozen=True)
class Leak:
    """Mean losses over the same tokens, nats."""

    training: float
    decoding: float

    @property
    def gap(self) -> float:
        """What the routing's knowledge of the future was worth to the loss of training."""
        return self.decoding - self.training


def measure_leak(run: Path, sequences: int) -> Leak:
    """Of a finished run, over the first held-out sequences. In a process of its own: it makes a process group."""
    with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as pool:
        return pool.submit(_measure, run, sequences).result()


def _measure(run: Path, sequences: int) -> Leak:
    torch.set_num_threads(1)
    with CheckpointReader(find_step_folder(run)) as reader, reference_model(reader) as decoder:
        config = config_from_dict(reader.config, "the checkpoint's config")
        data = open_data(config, rank=0)
        assert data.valid is not None
        with BatchLoader(data.valid, sequences, sequences, 0, 1, 0) as batches:
            (batch,) = next(batches)
        whole = _logits(decoder, batch.tokens)
        prefixes = [_logits(decoder, batch.tokens[:, : t + 1])[:, -1] for t in range(config.model.seq_length)]
        return Leak(_loss(whole, batch.labels), _loss(torch.stack(prefixes, dim=1), batch.labels))


def _logits(decoder: Decoder, tokens_bs: Tensor) -> Tensor:
    positions = torch.arange(tokens_bs.shape[1])[None].expand(tokens_bs.shape[0], -1)
    return decoder(tokens_bs, positions, None)


def _loss(logits_bsV: Tensor, labels_bs: Tensor) -> float:
    return F.cross_entropy(logits_bsV.flatten(0, 1), labels_bs.flatten()).item()
