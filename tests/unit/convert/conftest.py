"""Small models of every kind, with random weights under our checkpoint names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moetrain.checkpoint import Manifest, Piece, save_shard
from moetrain.config.model import ModelConfig
from moetrain.convert.architectures.moetrain import RULES
from moetrain.convert.hf_config import hf_config
from moetrain.convert.hf_modeling.modeling_moetrain import MoetrainForCausalLM
from moetrain.convert.mapping import ParamMap
from moetrain.data.train_tokenizer import train_sentencepiece

TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "def f(x):",
    "    return x + 1",
    "pack my box with five dozen jugs",
]
LAYOUT = {"description": "4 ranks = tensor 2 x data 2 x pipeline 1", "zero_stage": 1}
EXTRA = {
    "skipped_steps": 3,
    "loss": 3.25,
    "evaluation": {"iteration": 10, "loss": 3.5},
    "versions": {"moetrain": "0.1.0", "torch": "2.13.0"},
}
CONTROLLERS = ("router.bias", "thresholds", "quartiles", "offsets", "visits", "threshold")
HYPER = {"bottleneck": 3, "hidden": 7, "expert_embedding": 5, "process": 6, "condition": 4, "layer_embedding": 2}
HYPER_VARIANTS: dict[str, dict] = {
    "selected-layer": {"condition_on": "selected", "aggregation": "sum", "sharing": "layer"},
    "stage-embeddings": {"sharing": "stage", "stages": 3, "embeddings": "model", "layer_embedding": 0},
    "prob-gated": {"aggregation": "prob", "coefficient": "selected_probability"},
    "selected-prob": {"condition_on": "selected", "aggregation": "prob", "sharing": "stage", "stages": 1},
    "constant": {"condition_on": "constant", "embeddings": "model"},
    "static-gated": {"condition_on": "static", "coefficient": "selected_probability"},
}
DA = {"type": "da_moe", "min_k": 1, "max_k": 4, "mean_k": 2.0}
KINDS: dict[str, dict] = {
    "dense": {},
    "dense-tied": {"share_embeddings_and_output_weights": True},
    "dense-biased-wide-heads": {"kv_channels": 10, "add_qkv_bias": True, "qk_layernorm": "head"},
    "top_k": {"moe": {"layer_freq": 2}},
    "da_moe-normed-projections": {"qk_layernorm": "projection", "moe": {"router": DA | {"importance": "row_max"}}},
    "top_k-renormalized": {
        "moe": {"ffn_hidden_size": 12, "router": {"type": "top_k", "top_k": 3, "gates": "renormalized"}}
    },
    "top_k-sigmoid-shared": {
        "moe": {
            "num_experts": 6,
            "shared_expert_ffn_hidden_size": 11,
            "router": {"type": "top_k", "scores": "sigmoid", "scaling_factor": 2.5, "gates": "renormalized"},
            "hyper": HYPER | {"aggregation": "prob", "coefficient": "selected_probability"},
        }
    },
    "top_k-groups": {
        "moe": {
            "num_experts": 6,
            "router": {"type": "top_k", "groups": 3, "top_groups": 2, "group_score": "max", "scaling_factor": 1.5},
        }
    },
    "expert_bias-groups-hyper": {
        "moe": {
            "num_experts": 6,
            "shared_expert_ffn_hidden_size": 9,
            "router": {"type": "expert_bias", "groups": 3, "top_groups": 2, "top_k": 3, "bias_rate": 0.01},
            "hyper": HYPER,
        }
    },
    "top_k-hyper": {"moe": {"layer_freq": [1, 0, 1], "hyper": HYPER}},
    "top_k-hyper-sum-tied": {
        "share_embeddings_and_output_weights": True,
        "moe": {"hyper": HYPER | {"aggregation": "sum"}},
    },
    **{
        f"da_moe-{importance}-{budget}": {"moe": {"router": DA | {"importance": importance, "budget": budget}}}
        for importance in ("self_weight", "row_max", "row_entropy")
        for budget in ("mean_k", "paper")
    },
    "da_moe-low": {"moe": {"router": DA | {"importance": "row_max", "direction": "low"}}},
    "da_moe-debiased": {"moe": {"router": DA | {"importance": "row_max", "debias": "position", "mean_k": 2.5}}},
    "da_moe-predicted": {"moe": {"router": DA | {"importance": "predicted"}}},
    "da_moe-predicted-debiased-low": {
        "moe": {"router": DA | {"importance": "predicted", "debias": "position", "direction": "low"}}
    },
    "da_moe-all-experts": {"moe": {"router": {"type": "da_moe", "budget": "paper"}, "hyper": HYPER}},
    **{f"hyper-{name}": {"moe": {"router": DA, "hyper": HYPER | choices}} for name, choices in HYPER_VARIANTS.items()},
    "da_moe-hyper": {"moe": {"router": DA | {"gates": "renormalized"}, "hyper": HYPER, "layer_freq": 2}},
}


def make_model(kind: str) -> ModelConfig:
    settings = {"num_layers": 3, "hidden_size": 24, "num_attention_heads": 4, "num_query_groups": 2}
    settings |= {"ffn_hidden_size": 20, "vocab_size": 50, "seq_length": 64, "rotary_base": 500.0} | KINDS[kind]
    if "moe" in settings:
        settings["moe"] = {"num_experts": 5, "ffn_hidden_size": 9} | settings["moe"]
    return ModelConfig.model_validate(settings)


class DictSource:
    """A `WeightSource` over tensors in memory, which notes every read."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.largest_read = 0

    def names(self) -> Iterable[str]:
        return self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        block = self.tensors[name][tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
        assert tuple(block.shape) == tuple(shape)
        self.largest_read = max(self.largest_read, block.numel())
        return block.clone()


def random_weights(model: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """fp32 tensors under our names, large enough that attention, routing and the generated expert all matter."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in ParamMap(model, RULES).ours().items():
        noise = torch.randn(shape, generator=generator)
        if "layernorm" in name:
            weights[name] = 1 + 0.2 * noise
        elif name.endswith("thresholds"):
            # Log-odds in the middle of what attention over a few keys gives, negated where low importance counts.
            router = model.moe.router
            middle = {"row_max": 1.0, "row_entropy": 1.0, "predicted": 0.0}.get(router.importance, -0.7)
            weights[name] = ((-middle if router.direction == "low" else middle) + 0.7 * noise).sort(-1).values
        elif name.endswith("router.quartiles"):
            weights[name] = noise.sort(-1).values
        elif name.endswith("router.visits"):
            weights[name] = (10 * noise).abs().round()
        elif name.endswith("router.predictor"):
            weights[name] = noise / shape[0] ** 0.5
        elif len(shape) < 2:
            weights[name] = 0.3 * noise
        elif name.endswith(("expert_embedding", "layer_embedding")):
            weights[name] = noise
        else:
            weights[name] = noise * (2.0 if "router" in name or "linear_qkv" in name else 1.2) / shape[-1] ** 0.5
    return weights


@pytest.fixture(scope="session", params=KINDS)
def model(request: pytest.FixtureRequest) -> ModelConfig:
    """Each kind of model in turn."""
    return make_model(request.param)


@pytest.fixture(scope="session")
def of_kind() -> Callable[[str], ModelConfig]:
    """One kind of model by name."""
    return make_model


@pytest.fixture(scope="session")
def weights() -> Callable[[ModelConfig], dict[str, Tensor]]:
    return random_weights


@pytest.fixture(scope="session")
def source() -> type[DictSource]:
    return DictSource


@pytest.fixture(scope="session")
def build() -> Callable[[ModelConfig, dict[str, Tensor]], MoetrainForCausalLM]:
    """The Hugging Face model with our weights, straight from the table, without a folder."""

    def from_weights(model: ModelConfig, weights: dict[str, Tensor]) -> MoetrainForCausalLM:
        network = MoetrainForCausalLM(hf_config(model)).eval()
        missing, unexpected = network.load_state_dict(
            dict(ParamMap(model, RULES).export(DictSource(weights))), strict=False
        )
        assert not unexpected
        assert set(missing) <= ({"lm_head.weight"} if model.share_embeddings_and_output_weights else set())
        return network

    return from_weights


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 300 pieces."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(TEXT * 4, folder / "small", 300, "bpe")
    return folder / "small.model"


@pytest.fixture(scope="session")
def write_run(
    sentencepiece_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[ModelConfig, str], Path]:
    """Write a run folder with two committed steps, the way training does."""

    def write(model: ModelConfig, name: str) -> Path:
        model = model.model_copy(update={"vocab_size": 304})
        config = {
            "run": {"dir": "runs/x", "name": name},
            "model": model.model_dump(mode="json"),
            "data": {
                "tokenizer": {"path": str(sentencepiece_model)},
                "train": [{"path": "/secret/place/corpus_text", "weight": 2.0}],
            },
            "training": {"train_iters": 20, "global_batch_size": 4},
        }
        root = tmp_path_factory.mktemp("run")
        for step in (10, 20):
            folder = root / "checkpoints" / f"step-{step:08d}"
            folder.mkdir(parents=True)
            record = save_shard(folder, 0, _pieces(random_weights(model, seed=step)))
            manifest = Manifest(step, 4 * step, config, LAYOUT, EXTRA, record)
            (folder / "manifest.json").write_bytes(manifest.to_bytes())
        (root / "checkpoints" / "latest").write_text("step-00000020\n")
        return root

    return write


def _pieces(weights: dict[str, Tensor]) -> list[Piece]:
    """Weights, controllers, and the optimizer and random states that an export must pass by."""
    pieces = [Piece.whole("rng.0", torch.zeros(16, dtype=torch.uint8))]
    for name, tensor in weights.items():
        if name.endswith(CONTROLLERS):
            pieces.append(Piece.whole(f"controller.{name}", tensor))
            continue
        pieces.append(Piece.whole(f"weight.{name}", tensor))
        pieces.append(Piece.whole(f"optimizer.exp_avg.{name}", torch.zeros_like(tensor)))
    return pieces


@pytest.fixture(autouse=True, scope="session")
def offline() -> Iterable[None]:
    """No test of this folder may need the network."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    yield
