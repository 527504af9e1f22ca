"""Runs a checkpoint's model over text in this process and writes down what its routers decide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moetrain.checkpoint.reader import CheckpointReader
from moetrain.model.decoder import Decoder
from moetrain.model.reference_logits import reference_model
from moetrain.moe.layer import MoELayer
from moetrain.moe.routing import RoutingContext, RoutingDecision
from moetrain.moe.token_mask import without_hidden
from moetrain.report.passages import Passage, Reading
from moetrain.report.trace import LayerTrace, RoutingTrace


def trace_routing(
    reader: CheckpointReader, reading: Reading, advance: Callable[[int], None] = lambda tokens: None
) -> RoutingTrace:
    """One forward pass over each passage, in fp32 on CPU; `advance` is told of the tokens done.

    Makes a process group of one for the duration of the call; there must be none yet.
    """
    nll: list[np.ndarray] = []
    with reference_model(reader) as decoder, _recorded(decoder) as recorders:
        for passage in reading.passages:
            nll.append(_read(decoder, passage))
            advance(len(passage.ids))
    layers = tuple(recorder.trace() for recorder in recorders)
    return RoutingTrace(reader.step, reading, np.concatenate(nll), layers)


def _read(decoder: Decoder, passage: Passage) -> np.ndarray:
    """NLL of each token of a passage, NaN for the first."""
    tokens_S = torch.tensor(passage.ids)
    logits_SV = decoder(tokens_S[None], torch.arange(len(passage.ids))[None], None)[0].float()
    nll_S = torch.full((len(passage.ids),), torch.nan)
    nll_S[1:] = torch.nn.functional.cross_entropy(logits_SV[:-1], tokens_S[1:], reduction="none")
    return nll_S.numpy()


class _Recorder:
    """Collects what one layer's router was asked and what it answered."""

    def __init__(self, layer: MoELayer) -> None:
        self._layer = layer
        self._decisions: list[RoutingDecision] = []
        self._importance: list[Tensor] = []

    def __call__(self, router: nn.Module, inputs: tuple[Any, ...], decision: RoutingDecision) -> None:
        """`inputs`: a router is called as `router(x_TD, context)`."""
        context: RoutingContext = inputs[1]
        hidden_TE, importance_T = context.hidden_TE, context.importance_T
        self._decisions.append(decision if hidden_TE is None else without_hidden(decision, hidden_TE))
        if importance_T is not None:
            self._importance.append(importance_T)

    def trace(self) -> LayerTrace:
        """All passages in order."""
        return LayerTrace(
            layer=self._layer.number,
            num_experts=self._layer.moe.num_choices,
            num_selected_N=_joined([decision.num_selected_T for decision in self._decisions]),
            expert_ids_NK=_joined([decision.expert_ids_TK for decision in self._decisions]),
            weights_NK=_joined([decision.weights_TK for decision in self._decisions]),
            importance_N=_joined(self._importance) if self._importance else None,
        )


@contextmanager
def _recorded(decoder: Decoder) -> Iterator[list[_Recorder]]:
    layers = sorted((m for m in decoder.modules() if isinstance(m, MoELayer)), key=lambda layer: layer.number)
    recorders = [_Recorder(layer) for layer in layers]
    hooks = [layer.router.register_forward_hook(recorder) for layer, recorder in zip(layers, recorders, strict=True)]
    try:
        yield recorders
    finally:
        for hook in hooks:
            hook.remove()


def _joined(parts: Sequence[Tensor]) -> np.ndarray:
    return torch.cat([part.detach() for part in parts]).numpy()
