"""From a micro-batch to losses and to what an evaluation counts: one class for tokens, one for whole sequences.

Legend: B sequences, S positions, V vocabulary rows of this tensor rank, C outputs of a head.
"""

from __future__ import annotations

from typing import Protocol

import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from moetrain.config.objectives import ClassifyConfig, ObjectiveConfig, RegressConfig
from moetrain.data.loader import MicroBatch
from moetrain.model.decoder import Decoder


class Objective(Protocol):
    """How the model is called, and what its output costs."""

    outputs: int
    """numbers per sequence that an evaluation brings together: C, or 0"""

    def forward(self, model: Decoder, batch: MicroBatch, positions: Tensor, scored: bool) -> Tensor:
        """Call one chunk of the model. `scored`: `losses` will be asked for more than the loss."""
        ...

    def losses(
        self, model: Decoder, output: Tensor, batch: MicroBatch, scored: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """On the last stage: the loss of each label, shaped as the labels; with `scored` also which labels were the
        model's best guess (bool, as the labels) or the head's outputs (fp32 [B, C])."""
        ...


class TokenObjective:
    """Cross-entropy of tokens, causal or masked."""

    outputs = 0

    def __init__(self, counts_hits: bool, tensor_group: dist.ProcessGroup) -> None:
        """`counts_hits`: an evaluation also tells the accuracy."""
        self.counts_hits, self.tensor_group = counts_hits, tensor_group

    def forward(self, model: Decoder, batch: MicroBatch, positions: Tensor, scored: bool) -> Tensor:
        wants_losses = model.post_process and not (scored and self.counts_hits)
        labels = batch.labels if wants_losses else None
        return model(batch.tokens, positions, batch.valid, labels=labels)

    def losses(
        self, model: Decoder, output: Tensor, batch: MicroBatch, scored: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if not (scored and self.counts_hits):
            return output, None, None
        # First the guesses: Megatron's loss is free to overwrite the logits.
        hits_BS = best_tokens(output, self.tensor_group) == batch.labels
        return model.compute_language_model_loss(batch.labels, output.transpose(0, 1).contiguous()), hits_BS, None


class SequenceObjective:
    """Cross-entropy of classes, or squared error of scores, from a head's outputs."""

    def __init__(self, config: ClassifyConfig | RegressConfig) -> None:
        self.outputs = config.outputs
        self.regression = isinstance(config, RegressConfig)

    def forward(self, model: Decoder, batch: MicroBatch, positions: Tensor, scored: bool) -> Tensor:
        return model(batch.tokens, positions, batch.valid)

    def losses(
        self, model: Decoder, output: Tensor, batch: MicroBatch, scored: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self.regression:
            losses_B = (output[:, 0] - batch.labels).square()
        else:
            losses_B = F.cross_entropy(output, batch.labels, reduction="none")
        return losses_B, None, output if scored else None


def objective_of(config: ObjectiveConfig, tensor_group: dist.ProcessGroup) -> Objective:
    """The objective that a run's settings name."""
    if isinstance(config, ClassifyConfig | RegressConfig):
        return SequenceObjective(config)
    return TokenObjective(config.type == "masked_lm", tensor_group)


def best_tokens(logits_BSV: Tensor, tensor_group: dist.ProcessGroup) -> Tensor:
    """The id of the largest logit over the whole vocabulary, int64 [B, S]; of equal ones the lowest.

    Communication: two all-gathers of [B, S] over the tensor ranks, which split the vocabulary.
    """
    ids_BS = logits_BSV.argmax(dim=-1)
    if tensor_group.size() == 1:
        return ids_BS
    best_BS = logits_BSV.gather(-1, ids_BS[..., None])[..., 0].float()
    ids_BS = ids_BS + tensor_group.rank() * logits_BSV.shape[-1]
    every_best, every_id = _gather(best_BS, tensor_group), _gather(ids_BS, tensor_group)
    return every_id.gather(0, every_best.argmax(dim=0, keepdim=True))[0]


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    everyone = x.new_empty(group.size(), *x.shape)
    dist.all_gather(list(everyone.unbind()), x.contiguous(), group=group)
    return everyone
