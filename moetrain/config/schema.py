"""The whole run as one frozen tree. Loads without torch, so a login node answers in a blink.

Names are Megatron-LM's wherever it has one. A path such as `model.moe.router.top_k` is how YAML files, command-line
overrides and error messages all name a setting. Rules that involve one section live in that section; rules across
sections live in `rules.py`; rules that need the number of processes live in `layout.py`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from moetrain.config.attention import MultiLatentAttentionConfig, latent_attention_problems
from moetrain.config.objectives import CausalLMConfig, ObjectiveConfig
from moetrain.config.relatives import (
    CapacityConfig,
    CartesianConfig,
    ComputationFreeConfig,
    RouterStateConfig,
    TokenMaskConfig,
    expected_shares,
    relatives_problems,
)
from moetrain.config.routers import CAUSAL_IMPORTANCE, NONCAUSAL_IMPORTANCE, AnyRouter, TopKRouterConfig
from moetrain.config.rules import section_problems
from moetrain.config.section import Count, Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Section

# --- model ----------------------------------------------------------------------------------------------------------


class HyperConfig(Section):
    """HyperMoE (arXiv 2402.12656): a hypernetwork makes a small expert from the embeddings of the experts that a token
    did not select. The defaults are the paper's; the other choices are its ablations and controls."""

    bottleneck: PositiveInt = Field(default=64, description="hidden units of the generated expert (r; `adapter_dim`)")
    hidden: PositiveInt = Field(
        default=128, description="hidden units of the hypernetwork (h; `hypernetwork_bottleneck`)"
    )
    expert_embedding: PositiveInt = Field(default=128, description="size of an expert's embedding (t)")
    process: PositiveInt = Field(
        default=128, description="hidden units of the selection-embedding MLP (q; `process_dim`)"
    )
    condition: PositiveInt = Field(default=128, description="size of the hypernetwork's input (c; `hypernet_input`)")
    layer_embedding: Count = Field(
        default=10, description="size of a layer's embedding (m); 0: none, so layers with equal conditions share Ê"
    )
    condition_on: Literal["unselected", "selected", "random_fixed", "constant", "static"] = Field(
        default="unselected",
        description="what Ê is made from: the embeddings of the unselected or of the selected experts; unselected ones "
        "that are random and never learned (`random_fixed`); one learned vector, whatever was selected (`constant`); "
        "or nothing: an ordinary bottleneck branch in each layer and no hypernetwork (`static`)",
    )
    aggregation: Literal["sum", "mean", "prob"] = Field(
        default="mean",
        description="over the embeddings of condition_on's experts; the official code sums, at a fixed K the same as "
        "mean; prob weighs them by their renormalized router probabilities (detached), so each token has its own Ê",
    )
    sharing: Literal["model", "stage", "layer"] = Field(
        default="model", description="one hypernetwork for the model, for each of `stages` groups of layers, or a layer"
    )
    stages: PositiveInt | None = Field(
        default=None,
        description="with sharing stage, into how many equal groups of consecutive layers the model is cut; a property "
        "of the model, whatever its pipeline",
    )
    embeddings: Literal["layer", "model"] = Field(
        default="layer", description="whose the expert embeddings and their MLP are: each layer its own, or one for all"
    )
    coefficient: Literal["one", "selected_probability"] = Field(
        default="one",
        description="of Ê in the sum: 1, or the router's probability of the selected experts together, which sends Ê's "
        "gradient to the router",
    )
    form: Literal["auto", "grouped", "factorized", "per_token"] = Field(
        default="auto",
        description="how the generated expert is evaluated; auto picks the cheaper one for the number of expert sets "
        "that can occur; per_token generates weights for every token, as the official code does: for comparison",
    )
    recompute: bool = Field(
        default=False, description="keep none of Ê's activations and compute them again in the backward pass"
    )

    @model_validator(mode="after")
    def _settings_have_a_use(self) -> HyperConfig:
        if (self.sharing == "stage") != (self.stages is not None):
            raise ValueError(
                "stages (a number) and sharing: stage need each other; "
                f"they are {'unset' if self.stages is None else self.stages} and {self.sharing}"
            )
        if self.aggregation == "prob" and self.form == "grouped":
            raise ValueError(
                "form (grouped) generates an expert for each set of selected experts, and aggregation (prob) has a "
                "condition of its own for each token; legal: auto, factorized"
            )
        unused = {"constant": ("aggregation",), "static": ("aggregation", "sharing", "embeddings", "form")}
        for name in unused.get(self.condition_on, ()):
            default = HyperConfig.model_fields[name].default
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) means nothing with condition_on {self.condition_on}; remove it"
                )
        return self


class DispatchConfig(Section):
    """How rows travel to their experts and back. No setting here changes what a model computes."""

    max_rows: PositiveInt | None = Field(
        default=None,
        description="the most rows that a rank's experts take at once; where the router sends more, they come in "
        "rounds: that costs time, never more memory, and no token is dropped; default: no limit",
    )
    overlap: bool = Field(
        default=True,
        description="work while rows travel: the hyper-expert and the losses, and the experts of the round before",
    )


Activation = Literal["swiglu", "relu"]
"""Of MLPs and experts; see `ModelConfig.activation`."""


class MoEConfig(Section):
    """The mixture-of-experts blocks that stand in the MLP slot of some layers."""

    num_experts: PositiveInt = Field(description="experts of each MoE layer, over all ranks")
    ffn_hidden_size: PositiveInt = Field(description="hidden units of one expert (with swiglu, of gate and up each)")
    layer_freq: PositiveInt | list[Literal[0, 1]] = Field(
        default=1,
        description="every n-th layer is MoE, counted so that the last of each n is one; or one 0/1 per layer",
    )
    router: AnyRouter = Field(default_factory=TopKRouterConfig, description="who goes where; by `type`")
    hyper: HyperConfig | None = Field(default=None, description="the generated expert; absent: none")
    dispatch: DispatchConfig = Field(default_factory=DispatchConfig)
    aux_loss: Literal["per_sequence", "per_micro_batch", "global_batch"] = Field(
        default="per_sequence",
        description="whose loads the load-balancing loss evens out: those of each sequence, of a micro-batch, or of "
        "the whole global batch, by the counts of the step before",
    )
    aux_loss_coeff: NonNegativeFloat = Field(default=0.01, description="load-balancing loss")
    z_loss_coeff: NonNegativeFloat = Field(default=0.0, description="router z-loss")
    computation_free: ComputationFreeConfig | None = Field(
        default=None, description="choices beside the experts that compute nothing; absent: none"
    )
    capacity: CapacityConfig | None = Field(
        default=None, description="the most tokens of a sequence that an expert takes; absent: no token is dropped"
    )
    token_mask: TokenMaskConfig | None = Field(
        default=None, description="experts that a token may see by its vocabulary id; absent: all"
    )
    router_state: RouterStateConfig | None = Field(
        default=None, description="what a router knows of the MoE layer before; absent: nothing"
    )
    expert_widths: list[PositiveInt] | None = Field(
        default=None,
        description="hidden units of each expert, where they differ (MoDSE, arXiv 2409.12210: pairs that sum to twice "
        "ffn_hidden_size); on average ffn_hidden_size, also on every expert rank; absent: all alike",
    )
    cartesian: CartesianConfig | None = Field(
        default=None,
        description="two mixtures in a row in each MoE layer, each with `num_experts` experts; absent: one",
    )
    shared_expert_ffn_hidden_size: PositiveInt | None = Field(
        default=None, description="hidden units of an expert that every token gets with weight 1; absent: none"
    )

    @model_validator(mode="after")
    def _parts_fit_together(self) -> MoEConfig:
        if problems := [*self.router.problems(self.num_choices), *relatives_problems(self)]:
            raise ValueError("\n".join(problems))
        return self

    @property
    def num_choices(self) -> int:
        """Choices of the gate: the experts, and those of `computation_free`."""
        return self.num_experts + (self.computation_free.total if self.computation_free is not None else 0)

    @property
    def selectable(self) -> range:
        """The numbers of experts that a token of this model may get."""
        choices, free = self.router.selectable(self.num_choices), self.num_choices - self.num_experts
        return range(max(0, choices[0] - free), min(choices[-1], self.num_experts) + 1)

    @property
    def max_top_k(self) -> int:
        """The most choices that a token of this model can get."""
        return self.router.selectable(self.num_choices)[-1]

    @property
    def expected_choices(self) -> float:
        """Mean number of choices per token, or its upper bound where only training can tell."""
        return self.router.expected_mean_k(self.num_choices)

    @property
    def expected_mean_k(self) -> float:
        """Mean number of experts per token, or its upper bound where only training can tell; beside computation-free
        choices, what balanced routing gives."""
        share = 1.0 if self.computation_free is None else sum(expected_shares(self)[: self.num_experts])
        return self.expected_choices * share


class HeadConfig(Section):
    """A few numbers for a whole sequence, from a linear layer on its pooled final hidden states."""

    outputs: PositiveInt = Field(description="numbers per sequence: classes, or 1 for a score")
    pooling: Literal["mean", "first", "last"] = Field(
        default="mean", description="of the hidden states of real tokens: their mean, or that of the first or last one"
    )


class ModelConfig(Section):
    """A transformer: RMSNorm, rotary or relative positions, grouped-query or latent attention, SwiGLU or ReLU."""

    type: Literal["decoder", "encoder"] = Field(
        default="decoder", description="decoder: a token sees those before it; encoder: all tokens see each other"
    )
    head: HeadConfig | None = Field(
        default=None, description="of a sequence task, in the place of the output layer; absent: a language model"
    )
    num_layers: PositiveInt = Field(description="transformer layers")
    hidden_size: PositiveInt = Field(description="width of the residual stream")
    num_attention_heads: PositiveInt = Field(description="query heads")
    num_query_groups: PositiveInt | None = Field(
        default=None, description="key/value heads; default: num_attention_heads"
    )
    kv_channels: PositiveInt | None = Field(
        default=None, description="width of an attention head; default: hidden_size / num_attention_heads"
    )
    add_qkv_bias: bool = Field(default=False, description="biases on queries, keys and values (Qwen2)")
    qk_layernorm: Literal["head", "projection"] | None = Field(
        default=None,
        description="RMSNorm of queries and keys before the rotary positions: of each head with one weight for all "
        "(Qwen3), or of all heads together (OLMoE); absent: none",
    )
    multi_latent_attention: MultiLatentAttentionConfig | None = Field(
        default=None, description="keys and values from latents (DeepSeek-V2 and V3); absent: ordinary attention"
    )
    ffn_hidden_size: PositiveInt = Field(description="hidden units of a dense layer's MLP")
    activation: Activation = Field(
        default="swiglu",
        description="of MLPs and experts: silu(gate) * up, or max(0, x) of one projection (T5, Switch Transformers)",
    )
    vocab_size: PositiveInt = Field(description="rows of the embedding; at least the tokenizer's size")
    seq_length: PositiveInt = Field(description="tokens of a training sequence")
    share_embeddings_and_output_weights: bool = Field(
        default=False, description="one table for the embedding and the output layer"
    )
    layernorm_epsilon: PositiveFloat = Field(default=1e-5, description="added to the mean square in RMSNorm")
    position_embedding: Literal["rope", "relative"] = Field(
        default="rope",
        description="rope: rotated queries and keys; relative: a learned number for each head and distance, the same "
        "in every layer, on the attention's scores (T5, arXiv 1910.10683)",
    )
    relative_buckets: PositiveInt = Field(
        default=32,
        description="rows of the table of relative positions; an encoder has half of them for each direction",
    )
    relative_max_distance: PositiveInt = Field(
        default=128, description="from here on all distances share a row of the table of relative positions"
    )
    rotary_base: PositiveFloat = Field(default=10000.0, description="base period of the rotary positions")
    init_method_std: PositiveFloat = Field(
        default=0.02, description="standard deviation of initial weights; 1/sqrt(2 num_layers) of it into the residual"
    )
    recompute: Literal["none", "full"] = Field(
        default="none", description="activations: keep all, or only layer inputs"
    )
    moe: MoEConfig | None = Field(default=None, description="mixture-of-experts layers; absent: a dense model")

    @property
    def kv_heads(self) -> int:
        """Key/value heads, with the default resolved."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Width of one attention head; with latents, of its query and key."""
        if self.multi_latent_attention is not None:
            return self.multi_latent_attention.qk_width
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def value_dim(self) -> int:
        """Width of one head's value."""
        return self.head_dim if self.multi_latent_attention is None else self.multi_latent_attention.v_head_dim

    def is_moe_layer(self, layer: int) -> bool:
        """Whether the layer with this 0-based global number has experts."""
        if self.moe is None:
            return False
        freq = self.moe.layer_freq
        return bool(freq[layer]) if isinstance(freq, list) else (layer + 1) % freq == 0

    @property
    def router_numbers(self) -> list[int]:
        """A number for each router, under which its counts are reported: that of its layer, and where a layer has two,
        twice as much and one more."""
        layers = [i for i in range(self.num_layers) if self.is_moe_layer(i)]
        if self.moe is None or self.moe.cartesian is None:
            return layers
        return [number for i in layers for number in (2 * i, 2 * i + 1)]

    @model_validator(mode="after")
    def _shapes_divide(self) -> ModelConfig:
        if problems := list(latent_attention_problems(self)):
            raise ValueError("\n".join(problems))
        own_widths = self.kv_channels is not None or self.multi_latent_attention is not None
        if not own_widths and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be divisible by num_attention_heads "
                f"({self.num_attention_heads}); or set kv_channels"
            )
        if self.head_dim % 2 and self.position_embedding == "rope" and self.multi_latent_attention is None:
            name = "hidden_size / num_attention_heads" if self.kv_channels is None else "kv_channels"
            raise ValueError(f"{name} ({self.head_dim}) must be even for rotary positions")
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be divisible by num_query_groups "
                f"({self.kv_heads})"
            )
        if self.moe is not None:
            freq = self.moe.layer_freq
            if isinstance(freq, list) and len(freq) != self.num_layers:
                raise ValueError(f"moe.layer_freq has {len(freq)} entries; num_layers is {self.num_layers}")
            if not any(self.is_moe_layer(i) for i in range(self.num_layers)):
                raise ValueError(f"moe.layer_freq ({freq}) makes none of the {self.num_layers} layers a MoE layer")
            self._check_hypernetwork_stages()
            measure = self.moe.router.attention_measure
            if measure in NONCAUSAL_IMPORTANCE and self.type == "decoder" and not self.moe.router.allows_noncausal:
                raise ValueError(
                    f"moe.router.importance ({measure}) looks at later tokens, so in a causal model the "
                    f"routing of a token would leak its future; legal here: {', '.join(CAUSAL_IMPORTANCE)}"
                )
            if self.moe.router.attention_teacher is not None and self.type == "encoder":
                raise ValueError(
                    "moe.router.importance (predicted) stands in for the attention that a token will receive, which an "
                    "encoder knows; legal here: col_max, col_sum and the measures of rows"
                )
        return self

    @model_validator(mode="after")
    def _positions_and_activation_can_be_computed(self) -> ModelConfig:
        for name in ("relative_buckets", "relative_max_distance", "rotary_base"):
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default and name.startswith("relative_") != (self.position_embedding == "relative"):
                raise ValueError(f"{name} ({value}) means nothing with position_embedding {self.position_embedding}")
        if self.position_embedding == "relative":
            # Of a direction's rows half are single distances, and those beyond must lead up to the last one.
            rows = self.relative_buckets // (2 if self.type == "encoder" else 1)
            if rows < 2 or (self.type == "encoder" and self.relative_buckets % 2):
                legal = "an even number from 4 on" if self.type == "encoder" else "2 or more"
                raise ValueError(f"relative_buckets ({self.relative_buckets}) must be {legal} (type {self.type})")
            if self.relative_max_distance <= rows // 2:
                raise ValueError(
                    f"relative_max_distance ({self.relative_max_distance}) must exceed the {rows // 2} distances that "
                    f"have a row of their own (relative_buckets: {self.relative_buckets})"
                )
        moe = self.moe
        if moe is not None and self.activation == "relu" and moe.dispatch.max_rows is not None:
            raise ValueError(
                f"moe.dispatch.max_rows ({moe.dispatch.max_rows}) works in rounds of the fused expert operator, which "
                "is SwiGLU's; activation relu has none; remove one of the two"
            )
        by_probability = moe is not None and moe.capacity is not None and moe.capacity.order == "probability"
        if by_probability and self.type == "decoder":
            raise ValueError(
                "moe.capacity.order (probability) lets a later token take an earlier one's place, so in a causal "
                "model the future would change the past; legal here: position"
            )
        return self

    def _check_hypernetwork_stages(self) -> None:
        stages = self.moe.hyper.stages if self.moe is not None and self.moe.hyper is not None else None
        if stages is None:
            return
        if self.num_layers % stages:
            raise ValueError(f"moe.hyper.stages ({stages}) must divide num_layers ({self.num_layers})")
        size = self.num_layers // stages
        for first in range(0, self.num_layers, size):
            if not any(self.is_moe_layer(i) for i in range(first, first + size)):
                raise ValueError(
                    f"moe.hyper.stages ({stages}) leaves layers {first} to {first + size - 1} with a hypernetwork and "
                    "no MoE layer to use it (moe.layer_freq)"
                )

    @model_validator(mode="after")
    def _head_sees_the_sequence(self) -> ModelConfig:
        if self.type == "decoder" and self.head is not None and self.head.pooling == "first":
            raise ValueError(
                "head.pooling (first) in a decoder: the first token sees nothing but itself; legal here: last, mean"
            )
        return self


# --- everything else ------------------------------------------------------------------------------------------------


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
