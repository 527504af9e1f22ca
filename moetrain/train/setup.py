"""From a config and live groups to everything a step needs."""

from __future__ import annotations

import torch
from torch import nn

from moetrain.config.deepspeed import deepspeed_config
from moetrain.config.schema import RunConfig
from moetrain.model.build import build_chunks
from moetrain.model.parameters import describe_parameters, initialize
from moetrain.optim.zero import ZeroOptimizer
from moetrain.optim.zero3 import ZeroStage3Optimizer
from moetrain.runtime.groups import ParallelGroups
from moetrain.train.step import TrainStep

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_step(config: RunConfig, groups: ParallelGroups, device: torch.device) -> TrainStep:
    """Model, initial weights and optimizer of this rank. Collective over the world."""
    chunks = build_chunks(config.model, config.parallel, groups, DTYPES[config.training.precision], device)
    parameters = describe_parameters(chunks, groups, config.parallel.sequence)
    initialize(chunks, parameters, config.model, config.training.seed)
    settings = (parameters, groups, config.optimizer, deepspeed_config(config, groups.layout), device)
    if config.zero.stage < 3:
        return TrainStep(config, chunks, groups, ZeroOptimizer(*settings))
    (model,) = chunks
    tied = model.share_embeddings_and_output_weights
    borrowed = []
    if tied:
        embedding = model.shared_embedding_or_output_weight()
        assert isinstance(embedding, nn.Parameter)
        borrowed.append((model.output_layer, embedding))
    return TrainStep(config, chunks, groups, ZeroStage3Optimizer(model, borrowed, *settings))
