"""Rules between sections of a run that need no number of processes. What breaks one is told before anything starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from moetrain.config.objectives import CausalLMConfig, MaskedLMConfig
from moetrain.config.relatives import ranks_of_equal_size

if TYPE_CHECKING:
    from moetrain.config.schema import RunConfig


def section_problems(config: RunConfig) -> Iterator[str]:
    """One sentence per broken rule. Names in it are full paths of settings, so that the loader can say where they were
    set."""
    yield from _shard_problems(config)
    yield from _combination_problems(config)
    yield from _objective_problems(config)
    yield from _schedule_problems(config)
    yield from _retention_problems(config)


def _shard_problems(config: RunConfig) -> Iterator[str]:
    """Whether the parallel sizes divide the model."""
    model, par = config.model, config.parallel
    if model.num_attention_heads % par.tensor or model.kv_heads % par.tensor:
        yield (
            f"parallel.tensor ({par.tensor}) must divide model.num_attention_heads ({model.num_attention_heads}) "
            f"and model.num_query_groups ({model.kv_heads})"
        )
    for name in ("ffn_hidden_size", "vocab_size"):
        if getattr(model, name) % par.tensor:
            yield f"parallel.tensor ({par.tensor}) must divide model.{name} ({getattr(model, name)})"
    if (par.sequence or model.moe) and model.seq_length % par.tensor:
        yield f"parallel.tensor ({par.tensor}) must divide model.seq_length ({model.seq_length})"
    chunks = par.pipeline * par.virtual_pipeline
    if model.num_layers % chunks:
        yield (
            f"parallel.pipeline x parallel.virtual_pipeline ({par.pipeline} x {par.virtual_pipeline}) must divide "
            f"model.num_layers ({model.num_layers})"
        )
    if model.moe is None and par.expert > 1:
        yield f"parallel.expert ({par.expert}) needs a model with model.moe"
    if model.moe is not None and model.moe.num_experts % par.expert:
        legal = [n for n in range(1, model.moe.num_experts + 1) if model.moe.num_experts % n == 0]
        yield (
            f"parallel.expert ({par.expert}) must divide model.moe.num_experts ({model.moe.num_experts}); "
            f"legal: {', '.join(map(str, legal))}"
        )
    elif model.moe is not None and model.moe.expert_widths is not None:
        legal = ranks_of_equal_size(model.moe.expert_widths)
        if par.expert not in legal:
            yield (
                f"parallel.expert ({par.expert}) must give every rank experts of the same total width "
                f"(model.moe.expert_widths, cut in order); legal: {', '.join(map(str, legal))}"
            )


def _combination_problems(config: RunConfig) -> Iterator[str]:
    """Whether settings that exclude each other stand together."""
    model, par, train = config.model, config.parallel, config.training
    if config.zero.stage == 3 and par.pipeline > 1:
        yield (
            f"zero.stage (3) with parallel.pipeline ({par.pipeline}) hangs in DeepSpeed (its parameter gathering does "
            "not follow a pipeline schedule); legal: 0, 1, 2"
        )
    if config.zero.stage == 3 and model.moe is not None:
        yield "zero.stage (3) is refused by DeepSpeed for models with experts (model.moe); legal: 0, 1, 2"
    if config.zero.stage == 3 and model.position_embedding == "relative" and model.recompute == "full":
        yield (
            "zero.stage (3) with model.recompute (full): DeepSpeed reduces a gradient once in a backward pass, and the "
            "table of model.position_embedding (relative) gets one from each recomputed layer; legal: 0, 1, 2"
        )
    if train.global_batch_size % train.micro_batch_size:
        yield (
            f"training.micro_batch_size ({train.micro_batch_size}) must divide "
            f"training.global_batch_size ({train.global_batch_size})"
        )
    if config.checkpoint.load_weights_only and config.checkpoint.load is None:
        yield "checkpoint.load_weights_only: true needs checkpoint.load"
    if config.runtime.device == "cpu" and config.runtime.backend == "nccl":
        yield "runtime.backend nccl needs runtime.device cuda; legal with cpu: gloo"


def _objective_problems(config: RunConfig) -> Iterator[str]:
    """Whether the model can learn what the run is for, from the data that it names."""
    model, data, training = config.model, config.data, config.training
    objective = training.objective
    if objective.type == "causal_lm" and model.type == "encoder":
        yield (
            "training.objective.type (causal_lm) with model.type (encoder): every token would see the one that it "
            "must predict; legal with it: masked_lm, classify, regress"
        )
    if objective.type == "masked_lm" and model.type == "decoder":
        yield (
            "training.objective.type (masked_lm) with model.type (decoder): a token is predicted from both sides, and "
            "a decoder sees one; legal with it: causal_lm, classify, regress"
        )
    if isinstance(objective, CausalLMConfig | MaskedLMConfig):
        if model.head is not None:
            yield f"model.head stands where training.objective.type ({objective.type}) needs the output layer"
        return
    outputs = model.head.outputs if model.head is not None else None
    if outputs != objective.outputs:
        has = "no model.head" if outputs is None else f"{outputs}"
        yield (
            f"training.objective.type ({objective.type}) needs model.head.outputs: {objective.outputs}; there is {has}"
        )
    if any(entry.weight != 1.0 for entry in (*data.train, *data.valid)):
        yield f"data: weights other than 1 mean nothing to training.objective.type ({objective.type})"
    if data.split != type(data).model_fields["split"].default:
        yield f"data.split ({data.split}) means nothing to training.objective.type ({objective.type}); name data.valid"
    if not data.valid and training.eval_iters:
        yield (
            f"training.objective.type ({objective.type}) never cuts data.train; name data.valid, or set "
            "training.eval_iters: 0"
        )
    if config.zero.stage == 3:
        yield f"zero.stage (3) with training.objective.type ({objective.type}) is not supported; legal: 0, 1, 2"


def _schedule_problems(config: RunConfig) -> Iterator[str]:
    """Whether the learning rate can follow its schedule within this run."""
    schedule, lr, iters = config.optimizer.schedule, config.optimizer.lr, config.training.train_iters
    if schedule.min_lr > lr:
        yield f"optimizer.schedule.min_lr ({schedule.min_lr:g}) must not exceed optimizer.lr ({lr:g})"
    if schedule.warmup_iters > iters:
        yield (
            f"optimizer.schedule.warmup_iters ({schedule.warmup_iters}) must not exceed training.train_iters "
            f"({iters}): the run would end before its peak rate"
        )
    elif schedule.type == "wsd" and schedule.warmup_iters + (schedule.decay_iters or 0) > iters:
        yield (
            f"optimizer.schedule.warmup_iters + optimizer.schedule.decay_iters ({schedule.warmup_iters} + "
            f"{schedule.decay_iters}) must not exceed training.train_iters ({iters})"
        )


def _retention_problems(config: RunConfig) -> Iterator[str]:
    """Whether the checkpoints that are to be kept are ever made, and known to be the best."""
    checkpoint, training = config.checkpoint, config.training
    every, interval = checkpoint.keep_every, checkpoint.save_interval
    if every is not None and (not interval or every % interval):
        yield (
            f"checkpoint.keep_every ({every}) must be a multiple of checkpoint.save_interval ({interval}), which must "
            "be at least 1"
        )
    if not checkpoint.keep_best:
        return
    if not training.eval_iters:
        yield f"checkpoint.keep_best ({checkpoint.keep_best}) needs validation; training.eval_iters is 0"
    if interval and (not training.eval_interval or interval % training.eval_interval):
        yield (
            f"checkpoint.keep_best ({checkpoint.keep_best}) needs a validation with each save: "
            f"checkpoint.save_interval ({interval}) must be a multiple of training.eval_interval "
            f"({training.eval_interval}), which must be at least 1"
        )
