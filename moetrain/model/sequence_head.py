"""A model that gives a few numbers for a whole sequence.

Legend: B sequences, S sequence positions, D hidden size, C outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor, nn
from torch.nn import functional as F

from moetrain.config.model import HeadConfig
from moetrain.model.decoder import Decoder


class SequenceModel(Decoder):
    """A chunk whose last stage has a head in the place of the output layer.

    Every tensor rank computes the head's whole output from the whole sequence, so its gradients are no partial sums.
    """

    def __init__(self, *args: Any, head: HeadConfig, **kwargs: Any) -> None:
        # The output layer is built by Megatron and dropped: nothing may tie to it, or wait for its gradient.
        super().__init__(*args, **(kwargs | {"share_embeddings_and_output_weights": False}))
        self.pooling = head.pooling
        if self.post_process:
            del self.output_layer
            size, dtype = self.config.hidden_size, self.config.params_dtype
            self.head = nn.Linear(size, head.outputs, dtype=dtype)

    def _postprocess(self, hidden_states: Tensor, *, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """Megatron's hook after the last layer: fp32 [B, C] on the last stage, hidden states elsewhere."""
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            # All tensor ranks go on with equal gradients, of which each takes its own part.
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        assert attention_mask is not None
        pooled_BD = pool(hidden_states, attention_mask, self.pooling)
        return F.linear(pooled_BD, self.head.weight.float(), self.head.bias.float())


def pool(hidden_SBD: Tensor, valid_BS: Tensor, pooling: str) -> Tensor:
    """fp32 [B, D] of the real tokens of each sequence, which are its first ones. Zeros where there is none."""
    hidden_BSD = hidden_SBD.transpose(0, 1).float()
    count_B = valid_BS.sum(dim=1)
    if pooling == "mean":
        total_BD = hidden_BSD.masked_fill(~valid_BS[:, :, None], 0.0).sum(dim=1)
        return total_BD / count_B.clamp(min=1)[:, None]
    at_B = torch.zeros_like(count_B) if pooling == "first" else (count_B - 1).clamp(min=0)
    one_BD = hidden_BSD[torch.arange(len(at_B), device=at_B.device), at_B]
    return one_BD.masked_fill((count_B == 0)[:, None], 0.0)
