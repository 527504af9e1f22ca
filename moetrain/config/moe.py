"""The mixture-of-experts blocks of a model: experts, generated expert, dispatch. Their routers are in `routers.py`,
what related architectures add in `relatives.py`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moetrain.config.relatives import (
    CapacityConfig,
    CartesianConfig,
    ComputationFreeConfig,
    RouterStateConfig,
    TokenMaskConfig,
    expected_shares,
    relatives_problems,
)
from moetrain.config.routers import AnyRouter, TopKRouterConfig
from moetrain.config.section import Count, NonNegativeFloat, PositiveInt, Section


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
