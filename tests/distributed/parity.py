"""Five steps of a tiny HyperMoE + DA-MoE model on any layout, and what must come out the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from moetrain.config.layout import ParallelLayout
from moetrain.config.schema import RunConfig
from moetrain.data.loader import MicroBatch
from moetrain.model.parameters import describe_parameters, named_controllers
from moetrain.optim.zero import ZeroOptimizer
from moetrain.runtime.groups import ParallelGroups, create_groups
from moetrain.train.setup import build_step
from moetrain.train.step import TrainStep

STEPS = 5
GLOBAL_BATCH = 8


@dataclass(frozen=True)
class Layout:
    """A layout of the parity table."""

    name: str
    world: int
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    expert: int = 1
    sequence: bool = False


SINGLE = Layout("single", 1)
LAYOUTS = [
    Layout("dp2", 2),
    Layout("tp2", 2, tensor=2),
    Layout("tp2+sp", 2, tensor=2, sequence=True),
    Layout("pp2", 2, pipeline=2),
    Layout("pp2 interleaved", 2, pipeline=2, virtual_pipeline=2),
    Layout("ep2", 2, expert=2),
    Layout("ep4", 4, expert=4),
    Layout("ep2 of dp4", 4, expert=2),
    Layout("pp2 x ep2", 4, pipeline=2, expert=2),
    Layout("tp2 x ep2", 2, tensor=2, expert=2),
    Layout("tp2+sp x ep2", 2, tensor=2, expert=2, sequence=True),
    Layout("tp2+sp x pp2 x ep2", 8, tensor=2, pipeline=2, expert=2, sequence=True),
    Layout("tp2+sp x pp2 interleaved x ep2", 4, tensor=2, pipeline=2, virtual_pipeline=2, expert=2, sequence=True),
]


@dataclass(frozen=True)
class Trajectory:
    """Losses and gradient norms of each step, and the final weights (whole tensors, float32, by global name)."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]
    controllers: dict[str, Any]


def tiny_config(layout: Layout, zero: int = 1, tied: bool = False, **changes: object) -> RunConfig:
    """The model of the parity table: 4 layers, three of them MoE, all parts switched on."""
    tree = {
        "run": {"dir": "unused"},
        "model": {
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "ffn_hidden_size": 48,
            "vocab_size": 64,
            "seq_length": 16,
            "share_embeddings_and_output_weights": tied,
            "init_method_std": 0.08,
            "moe": {
                "num_experts": 4,
                "ffn_hidden_size": 24,
                "layer_freq": [1, 0, 1, 1],
                "router": {"type": "da_moe", "importance": "self_weight", "mean_k": 2.0},
                "hyper": {
                    "bottleneck": 4,
                    "hidden": 8,
                    "expert_embedding": 6,
                    "process": 10,
                    "condition": 8,
                    "layer_embedding": 4,
                },
                "z_loss_coeff": 0.001,
            },
        },
        "parallel": {
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "virtual_pipeline": layout.virtual_pipeline,
            "expert": layout.expert,
            "sequence": layout.sequence,
        },
        "data": {"tokenizer": {"path": "unused"}, "train": [{"path": "unused"}]},
        "optimizer": {"lr": 1e-3, "clip_grad": 0.5},
        "zero": {"stage": zero},
        "training": {
            "train_iters": STEPS,
            "global_batch_size": GLOBAL_BATCH,
            "micro_batch_size": 1,
            "precision": "fp32",
        },
    }
    for path, value in changes.items():
        node = tree
        *parents, last = path.split("__")
        for key in parents:
            node = node[key]
        node[last] = value
    return RunConfig.model_validate(tree)


def batch_of(step: int, config: RunConfig, data_rank: int, data_size: int) -> list[MicroBatch]:
    """A learnable synthetic global batch (arithmetic progressions), and this rank's share of it."""
    generator = torch.Generator().manual_seed(9000 + step)
    size, length, vocab = config.training.global_batch_size, config.model.seq_length, config.model.vocab_size
    start = torch.randint(0, vocab, (size, 1), generator=generator)
    stride = torch.randint(1, 4, (size, 1), generator=generator)
    rows = (start + stride * torch.arange(length + 1)) % vocab
    mine = rows.view(data_size, -1, config.training.micro_batch_size, length + 1)[data_rank]
    return [MicroBatch(tokens=r[:, :-1].contiguous(), labels=r[:, 1:].contiguous()) for r in mine]


def layout_of(config: RunConfig) -> ParallelLayout:
    """The config's layout over the processes that are there."""
    p = config.parallel
    return ParallelLayout(
        dist.get_world_size(),
        tensor=p.tensor,
        pipeline=p.pipeline,
        expert=p.expert,
        virtual_pipeline=p.virtual_pipeline,
    )


def train_all(configs: list[RunConfig]) -> list[Trajectory]:
    """Run in every rank: one trajectory per config. The configs share a layout, so groups are made once."""
    groups = create_groups(layout_of(configs[0]), seed=1)
    return [_train(config, groups) for config in configs]


def train_with_broken_tie(config: RunConfig) -> Trajectory:
    """The same, but the gradients of tied parameters are not summed over the pipeline stages."""
    whole = ZeroOptimizer._replica_groups

    def without_stages(self: ZeroOptimizer, key: Any) -> Iterator[tuple[dist.ProcessGroup, int]]:
        return whole(self, dataclasses.replace(key, tied="no"))

    ZeroOptimizer._replica_groups = without_stages
    return _train(config, create_groups(layout_of(config), seed=1), check_copies=False)


def _train(config: RunConfig, groups: ParallelGroups, check_copies: bool = True) -> Trajectory:
    step = build_step(config, groups, torch.device("cpu"))
    losses, norms = run_steps(step, range(STEPS))
    return Trajectory(losses, norms, whole_weights(step, check_copies), whole_controllers(step))


def run_steps(step: TrainStep, numbers: range) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of these steps of the synthetic run."""
    losses, norms = [], []
    groups, config = step.groups, step.config
    for i in numbers:
        outcome = step.run(batch_of(i, config, groups.coordinates.data, groups.layout.data), config.optimizer.lr)
        assert not outcome.skipped
        losses.append(outcome.loss)
        norms.append(outcome.grad_norm)
    return losses, norms


def whole_weights(step: TrainStep, check_copies: bool = True) -> dict[str, torch.Tensor]:
    """Every weight of the model, put together from all ranks; copies of one element must agree to the bit."""
    parallel = step.config.parallel
    infos = describe_parameters(step.chunks, step.groups, parallel.sequence)
    mine = [(i.name, i.global_shape, i.blocks, i.parameter.detach().float().clone()) for i in infos]
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    whole: dict[str, torch.Tensor] = {}
    for name, shape, blocks, local in (entry for entries in everyone for entry in entries):
        target = whole.setdefault(name, torch.full(shape, float("nan")))
        row = 0
        for block in blocks:
            piece = local[row : row + block.rows]
            index = tuple(slice(o, o + n) for o, n in zip(block.offset, piece.shape, strict=True))
            known = ~target[index].isnan()
            same = torch.equal(target[index][known], piece[known])
            assert same or not check_copies, f"copies of {name} differ"
            target[index] = piece
            row += block.rows
    for name, tensor in whole.items():
        assert not tensor.isnan().any(), f"no rank holds all of {name}"
    return whole


def whole_controllers(step: TrainStep) -> dict[str, Any]:
    """The controllers' states of all stages."""
    mine = {name: c.tolist() for name, c in named_controllers(step.chunks)}
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return {name: value for entry in everyone for name, value in entry.items()}


def differences(run: Trajectory, reference: Trajectory) -> tuple[float, float, float]:
    """Largest relative difference of loss, of gradient norm, and of any weight tensor (L2 norm of the difference over
    the L2 norm of the tensor)."""
    loss = max(abs(a - b) / abs(b) for a, b in zip(run.losses, reference.losses, strict=True))
    norm = max(abs(a - b) / abs(b) for a, b in zip(run.norms, reference.norms, strict=True))
    assert run.weights.keys() == reference.weights.keys()
    weights = max(
        float((run.weights[k] - reference.weights[k]).norm() / reference.weights[k].norm()) for k in reference.weights
    )
    return loss, norm, weights
