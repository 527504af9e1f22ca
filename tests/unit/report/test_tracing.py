"""What is recorded is what the model did: against the export's own, independent model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moetrain.config.model import ModelConfig
from moetrain.convert.architectures.moetrain import RULES
from moetrain.convert.hf_config import hf_config
from moetrain.convert.hf_modeling.modeling_moetrain import MoetrainForCausalLM, MoetrainRouter
from moetrain.convert.mapping import ParamMap
from moetrain.report.passages import Passage, Reading
from moetrain.report.trace import RoutingTrace
from moetrain.report.tracing import trace_routing

HYPER = {"bottleneck": 3, "hidden": 7, "expert_embedding": 5, "process": 6, "condition": 4, "layer_embedding": 2}
KINDS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "top_k": {"router": {"type": "top_k", "top_k": 2}, "layer_freq": 2},
    "da_moe-mean_k-hyper": {
        "router": {"type": "da_moe", "importance": "row_entropy", "mean_k": 2.0, "max_k": 4},
        "hyper": HYPER,
        "layer_freq": [1, 0, 1],
    },
    "da_moe-paper": {"router": {"type": "da_moe", "budget": "paper", "importance": "row_max", "gates": "renormalized"}},
}


def make_model(kind: str) -> ModelConfig:
    moe = KINDS[kind]
    settings: dict[str, Any] = {"num_layers": 3, "hidden_size": 24, "num_attention_heads": 4, "num_query_groups": 2}
    settings |= {"ffn_hidden_size": 20, "vocab_size": 50, "seq_length": 64}
    if moe is not None:
        settings["moe"] = {"num_experts": 5, "ffn_hidden_size": 9} | moe
    return ModelConfig.model_validate(settings)


class Checkpoint:
    """The part of a `CheckpointReader` that tracing reads, over random weights."""

    step = 7

    def __init__(self, model: ModelConfig) -> None:
        generator = torch.Generator().manual_seed(0)
        self.config = {
            "run": {"dir": "x"},
            "model": model.model_dump(mode="json"),
            "data": {"tokenizer": {"path": "x"}, "train": [{"path": "x"}]},
            "training": {"train_iters": 1, "global_batch_size": 1},
        }
        self.tensors: dict[str, Tensor] = {}
        for name, shape in ParamMap(model, RULES).ours().items():
            noise = torch.randn(shape, generator=generator)
            scale = 1.5 / shape[-1] ** 0.5 if len(shape) > 1 else 0.3
            self.tensors[name] = noise * scale + (1.0 if "layernorm" in name else 0.0)

    def read(self, name: str, offset: Any = None, shape: Any = None) -> Tensor:
        # What only moves a controller is in no export, and of no consequence here.
        tensor = self.tensors.get(name.removeprefix("weight.").removeprefix("controller."), torch.zeros(()))
        if shape is not None:
            tensor = tensor[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
        return tensor.clone()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def names(self) -> list[str]:
        return list(self.tensors)


@contextmanager
def watched(network: MoetrainForCausalLM) -> Iterator[list[list[tuple[Tensor | None, Tensor, Tensor]]]]:
    """(importance, gates, selected) of each call of each router of the exported model."""
    routers = [module for module in network.modules() if isinstance(module, MoetrainRouter)]
    seen: list[list[tuple[Tensor | None, Tensor, Tensor]]] = [[] for _ in routers]
    hooks = [
        router.register_forward_hook(lambda _, inputs, out, calls=calls: calls.append((inputs[1], *out[:2])))
        for router, calls in zip(routers, seen, strict=True)
    ]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.fixture(scope="module", params=KINDS)
def traced(request: pytest.FixtureRequest) -> tuple[Checkpoint, RoutingTrace]:
    checkpoint = Checkpoint(make_model(request.param))
    random = torch.Generator().manual_seed(1)
    lengths = (17, 2, 40)
    ids = [tuple(torch.randint(50, (n,), generator=random).tolist()) for n in lengths]
    reading = Reading("", tuple(Passage("", i, ("",) * len(i)) for i in ids), "")
    return checkpoint, trace_routing(checkpoint, reading)  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def test_losses_and_routing_are_those_of_the_exported_model(traced: tuple[Checkpoint, RoutingTrace]) -> None:
    checkpoint, trace = traced
    model = ModelConfig.model_validate(checkpoint.config["model"])
    network = MoetrainForCausalLM(hf_config(model)).eval()
    network.load_state_dict(dict(ParamMap(model, RULES).export(checkpoint)), strict=False)  # pyright: ignore
    nll: list[float] = []
    with watched(network) as seen:
        for passage in trace.reading.passages:
            logits = network(torch.tensor([passage.ids]), use_cache=False).logits[0].double()
            told = logits.log_softmax(-1)
            nll += [math.nan, *(-told[i, token].item() for i, token in enumerate(passage.ids[1:]))]
    np.testing.assert_allclose(trace.nll_N, nll, rtol=1e-4, atol=1e-5)
    assert trace.step == 7
    assert [layer.layer for layer in trace.layers] == [i for i in range(3) if model.is_moe_layer(i)]
    for layer, calls in zip(trace.layers, seen, strict=True):
        gates = torch.cat([gate for _, gate, _ in calls]).numpy()
        selected = torch.cat([chosen for _, _, chosen in calls]).numpy()
        ours = np.zeros_like(gates)
        used = layer.expert_ids_NK >= 0
        ours[np.nonzero(used)[0], layer.expert_ids_NK[used]] = layer.weights_NK[used]
        np.testing.assert_allclose(ours, gates, atol=1e-5)
        np.testing.assert_array_equal(layer.num_selected_N, selected.sum(1))
        if calls[0][0] is None:
            assert layer.importance_N is None
        else:
            told = torch.cat([importance for importance, _, _ in calls if importance is not None])
            np.testing.assert_allclose(layer.importance_N, told.numpy(), atol=1e-5)


def test_a_token_that_knows_its_importance_gets_experts_by_it(traced: tuple[Checkpoint, RoutingTrace]) -> None:
    checkpoint, trace = traced
    router = (checkpoint.config["model"]["moe"] or {}).get("router", {})
    for layer in trace.layers:
        assert (layer.importance_N is not None) == (router["type"] == "da_moe")
        if router["type"] == "top_k":
            assert set(layer.num_selected_N) == {2}
        elif layer.importance_N is not None:
            importance = layer.importance_N.astype(np.float64)[:, None]
            thresholds = checkpoint.tensors.get(f"decoder.layers.{layer.layer}.mlp.router.thresholds")
            steps = np.arange(1, 5) / 5 if thresholds is None else thresholds[0].sigmoid().double().numpy()
            # The paper's ceil(5 I) is one more for each fifth that the importance exceeds.
            expected = 1 + (importance > steps).sum(axis=1)
            near = (np.abs(importance - steps) < 1e-5).any(axis=1)
            np.testing.assert_array_equal(layer.num_selected_N[~near], expected[~near])
