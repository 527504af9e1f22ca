"""The whole run as one frozen tree. Loads without torch, so a login node answers in a blink.

Names are Megatron-LM's wherever it has one. A path such as `model.moe.router.top_k` is how YAML files, command-line
overrides and error messages all name a setting. Rules that involve one section live in that section (that of the model
in `model.py` and `moe.py`); rules across sections live in `rules.py`; rules that need the number of processes live in
`layout.py`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from moetrain.config.model import ModelConfig
from moetrain.config.objectives import CausalLMConfig, ObjectiveConfig
from moetrain.config.rules import section_problems
from moetrain.config.section import Count, Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Section


class ParallelConfig(Section):
    """How the processes share the model. Data parallelism is what remains of the world size."""

    tensor: PositiveInt = Field(default=1, description="ranks that split each dense weight")
    pipeline: PositiveInt = Field(default=1, description="ranks that split the layers")
    virtual_pipeline: PositiveInt = Field(
        default=1, description="model chunks per pipeline rank; above 1: interleaved 1F1B"
    )
    expert: PositiveInt = Field(default=1, description="ranks that split the experts")
    sequence: bool = Field(default=False, description="sequence parallelism over the tensor ranks")

    @model_validator(mode="after")
    def _combinations(self) -> ParallelConfig:
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(f"virtual_pipeline ({self.virtual_pipeline}) needs pipeline > 1")
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence: true needs tensor > 1")
        return self


class BlendEntry(Section):
    """One corpus of a blend: a Megatron .bin/.idx prefix and its weight; for sequence tasks a file of examples."""

    path: str = Field(description="prefix of the .bin and .idx files; of sequence tasks, a .jsonl or .tsv file")
    weight: PositiveFloat = Field(default=1.0, description="share of the samples, relative to the other entries")


class TokenizerConfig(Section):
    """Where the tokenizer lies."""

    type: Literal["sentencepiece", "huggingface"] = Field(default="sentencepiece", description="kind of file")
    path: str = Field(description="a .model file (sentencepiece), a tokenizer.json or its folder (huggingface)")


class DataConfig(Section):
    """Corpora in Megatron's .bin/.idx format, blended and shuffled by megatron.core.datasets."""

    tokenizer: TokenizerConfig
    train: list[BlendEntry] = Field(min_length=1, description="corpora to train on, blended by weight")
    valid: list[BlendEntry] = Field(default_factory=list, description="own corpora; without: `split` cuts train")
    split: str = Field(default="98,2,0", description="train,valid,test shares of `train` when `valid` is empty")
    cache_dir: str | None = Field(default=None, description="index cache; default: <run.dir>/data-cache")

    @field_validator("split")
    @classmethod
    def _three_shares(cls, value: str) -> str:
        try:
            shares = [float(x) for x in value.split(",")]
        except ValueError:
            shares = []
        if len(shares) != 3 or not all(0 <= share < math.inf for share in shares) or shares[0] == 0:
            raise ValueError("must be three non-negative numbers 'train,valid,test', all finite, the first above 0")
        return value


class ScheduleConfig(Section):
    """Learning rate over iterations: warm-up from 0, then the named shape down to min_lr."""

    type: Literal["wsd", "cosine", "linear", "constant"] = Field(
        default="wsd", description="shape after the warm-up; wsd holds the peak and decays at the end"
    )
    warmup_iters: Count = Field(default=0, description="iterations of linear warm-up")
    decay_iters: PositiveInt | None = Field(
        default=None,
        description="wsd: length of the final decay (default: a fifth of train_iters); cosine, linear: where min_lr is "
        "reached (default: train_iters)",
    )
    min_lr: NonNegativeFloat = Field(default=0.0, description="learning rate at the end of the decay")

    @model_validator(mode="after")
    def _shape_has_a_use_for_what_is_set(self) -> ScheduleConfig:
        if self.type == "constant":
            for name, value in (("decay_iters", self.decay_iters), ("min_lr", self.min_lr or None)):
                if value is not None:
                    raise ValueError(
                        f"{name} ({value}) means nothing with type constant, which never decays; remove it, or choose "
                        "wsd, cosine or linear"
                    )
        elif self.type != "wsd" and self.decay_iters is not None and self.decay_iters <= self.warmup_iters:
            raise ValueError(
                f"decay_iters ({self.decay_iters}) is the iteration where {self.type} reaches min_lr; it must exceed "
                f"warmup_iters ({self.warmup_iters})"
            )
        return self


class OptimizerConfig(Section):
    """AdamW on fp32 masters."""

    type: Literal["auto", "adamw", "cpu_adam", "apex_fused_adam"] = Field(
        default="auto",
        description="auto: NVIDIA apex's FusedAdam on a GPU when it is there, else torch's fused AdamW; cpu_adam: "
        "DeepSpeed's, on CPU",
    )
    lr: PositiveFloat = Field(default=3e-4, description="peak learning rate")
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.95), description="decay rates of Adam's two moments")
    eps: PositiveFloat = Field(default=1e-8, description="added to the root of Adam's second moment")
    weight_decay: NonNegativeFloat = Field(
        default=0.1, description="on matrices; norms, biases and embeddings of experts and layers are exempt"
    )
    clip_grad: NonNegativeFloat = Field(default=1.0, description="largest norm of all gradients together; 0: off")
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)


class ZeroConfig(Section):
    """DeepSpeed ZeRO owns the optimizer state."""

    stage: Literal[0, 1, 2, 3] = Field(
        default=1, description="partitions nothing, optimizer state, gradients too, parameters too (dense models only)"
    )
    reduce_bucket_size: PositiveInt = Field(default=50_000_000, description="elements per reduction bucket")


class TrainingConfig(Section):
    """The loop."""

    train_iters: PositiveInt = Field(description="optimizer steps of the whole run")
    global_batch_size: PositiveInt = Field(description="sequences per step")
    micro_batch_size: PositiveInt = Field(default=1, description="sequences per forward pass of one data-parallel rank")
    precision: Literal["fp32", "bf16"] = Field(
        default="bf16", description="of parameters and activations; masters are fp32"
    )
    objective: ObjectiveConfig = Field(default_factory=CausalLMConfig, description="what is learned; by `type`")
    seed: Count = 1234
    log_interval: PositiveInt = 10
    eval_interval: Count = Field(default=0, description="iterations between validations; 0: only at the end")
    eval_iters: Count = Field(
        default=10,
        description="global batches per validation; 0: never; sequence tasks (classify, regress) always read all of "
        "their validation data",
    )
    stop_after: PositiveInt | None = Field(
        default=None, description="leave cleanly after this iteration, with a checkpoint"
    )
    max_skipped_steps: PositiveInt = Field(
        default=20, description="in a row, for non-finite gradients, before giving up"
    )


class CheckpointConfig(Section):
    """Sharded checkpoints that any layout can resume."""

    save_interval: Count = Field(default=0, description="iterations between saves; 0: only at the end")
    keep_last: PositiveInt = Field(default=3, description="newest checkpoints to keep")
    keep_every: PositiveInt | None = Field(
        default=None, description="also keep every checkpoint whose iteration this divides; a multiple of save_interval"
    )
    keep_best: Count = Field(
        default=0,
        description="also keep so many with the lowest validation loss, the best of which the file `best` names; every "
        "save must have been validated: save_interval a multiple of training.eval_interval",
    )
    async_save: bool = Field(
        default=True,
        description="write while training goes on: it waits for a copy of this rank's share to host memory (12 bytes "
        "per parameter that the rank owns, held from the first save on); false: training waits for the disk",
    )
    verify_after_write: Literal["size", "checksum"] = Field(
        default="size",
        description="before a save is committed: whether each file has its length, or also whether it reads back as it "
        "was written (costs reading it from disk)",
    )
    max_failed_saves: PositiveInt = Field(
        default=3,
        description="in a row, before the run gives up; fewer are told in log and metrics. The last save of a run must "
        "not fail",
    )
    resume: Literal["auto", "never"] = Field(
        default="auto", description="auto: this run's newest sound checkpoint, if any"
    )
    load: str | None = Field(
        default=None,
        description="where to start when this run has no checkpoint of its own: a step folder, or a `checkpoints` or "
        "run folder (its newest)",
    )
    load_weights_only: bool = Field(
        default=False,
        description="of `load` take weights and controllers only: step 0, fresh optimizer, first sample; a head that "
        "the checkpoint lacks starts from its initial values, and the log says so",
    )


class RuntimeConfig(Section):
    """What the processes run on."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    timeout_minutes: PositiveFloat = 10.0
    cpu_threads: PositiveInt | None = Field(
        default=None, description="per process, on CPU; default: cores / local processes"
    )


class RunSection(Section):
    """Identity of the run."""

    dir: str = Field(description="run folder: resolved config, logs, metrics, TensorBoard, checkpoints")
    name: str = "moetrain"


class RunConfig(Section):
    """One run, whole."""

    run: RunSection
    model: ModelConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    data: DataConfig
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    zero: ZeroConfig = Field(default_factory=ZeroConfig)
    training: TrainingConfig
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description="further DeepSpeed settings, in DeepSpeed's own JSON names; must not contradict ours",
    )

    @model_validator(mode="after")
    def _sections_fit_together(self) -> RunConfig:
        problems = list(section_problems(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self
