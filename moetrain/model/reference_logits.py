"""The training model itself from a checkpoint, in one process: what exports are measured against, and what reports look
into."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moetrain.config.layout import ParallelLayout
from moetrain.config.loader import config_from_dict
from moetrain.config.schema import ParallelConfig
from moetrain.model.build import build_chunks
from moetrain.model.decoder import Decoder
from moetrain.model.parameters import named_controllers, named_parameters
from moetrain.model.sequence_head import SequenceModel
from moetrain.runtime.groups import ParallelGroups, create_groups, destroy_groups


class WeightSource(Protocol):
    """The part of a checkpoint reader that is needed here."""

    @property
    def config(self) -> dict[str, Any]:
        """The resolved RunConfig as a tree."""
        ...

    def read(self, name: str) -> Tensor:
        """A whole tensor by its name in the checkpoint."""
        ...


def megatron_logits(reader: WeightSource, tokens: Tensor) -> Tensor:
    """Logits, fp32 [b, s, V], for tokens, int64 [b, s] with s at most `model.seq_length`, computed in fp32 on CPU; of a
    model with a head its outputs, [b, C].

    Makes a process group of one for the duration of the call; there must be none yet.
    """
    with reference_model(reader) as decoder:
        positions = torch.arange(tokens.shape[1])[None].expand(tokens.shape[0], -1)
        # A head pools real tokens, and must be told which these are.
        valid = torch.ones_like(tokens, dtype=torch.bool) if isinstance(decoder, SequenceModel) else None
        return decoder(tokens, positions, valid)


def encoder_states(reader: WeightSource, tokens: Tensor, valid: Tensor) -> Tensor:
    """Final hidden states, fp32 [b, s, d], of an encoder without a head, for tokens, int64 [b, s], of which `valid`,
    bool [b, s], tells the real ones. As `megatron_logits` otherwise."""
    with reference_model(reader) as decoder:
        return final_states(decoder, tokens, valid)


def final_states(decoder: Decoder, tokens: Tensor, valid: Tensor) -> Tensor:
    """[b, s, d] of a whole model in one process, differentiable where gradients are on."""
    states: list[Tensor] = []

    def keep(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        states.append(output)

    hook = decoder.decoder.register_forward_hook(keep)
    positions = torch.arange(tokens.shape[1])[None].expand(tokens.shape[0], -1)
    try:
        decoder(tokens, positions, valid)
    finally:
        hook.remove()
    (final_SBD,) = states
    return final_SBD.transpose(0, 1)


@contextmanager
def reference_model(reader: WeightSource) -> Iterator[Decoder]:
    """The whole model, fp32 on CPU, in evaluation mode, with the checkpoint's weights and controllers.

    Makes a process group of one for the duration of the block; there must be none yet.
    """
    model = config_from_dict(reader.config, "the checkpoint's config").model
    with _single_process() as groups, torch.no_grad():
        (decoder,) = build_chunks(model, ParallelConfig(), groups, torch.float32, torch.device("cpu"))
        for name, parameter in named_parameters([decoder]):
            parameter.copy_(reader.read(f"weight.{name}"))
        for name, controller in named_controllers([decoder]):
            controller.copy_(reader.read(f"controller.{name}"))
        yield decoder.eval()


@contextmanager
def _single_process() -> Iterator[ParallelGroups]:
    assert not dist.is_initialized(), "reference logits need a process of their own"
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(minutes=1))
    try:
        yield create_groups(ParallelLayout(1), seed=0)
    finally:
        destroy_groups()
        dist.destroy_process_group()
