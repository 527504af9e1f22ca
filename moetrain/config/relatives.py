"""Settings of the methods next to HyperMoE and DA-MoE: choices without computation, capacity, masks by token, routers
with a memory. No torch. docs/concepts/relatives.md tells what each computes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from moetrain.config.section import Count, PositiveFloat, PositiveInt, Section

if TYPE_CHECKING:
    from moetrain.config.model import ModelConfig
    from moetrain.config.moe import MoEConfig

DEFAULT_STATE_WIDTH = 128


class ComputationFreeConfig(Section):
    """Choices of the gate beside the experts that cost next to nothing and never travel (MoE++, arXiv 2410.07348;
    AdaMoE, arXiv 2406.13233)."""

    zero_experts: Count = Field(default=0, description="choices whose output is 0 (AdaMoE's null experts)")
    copy_experts: Count = Field(default=0, description="choices whose output is the token itself")
    constant_experts: Count = Field(
        default=0, description="choices whose output mixes the token with a trained vector: a1 x + a2 v"
    )
    gates: Literal["as_routed", "nonzero"] = Field(
        default="as_routed",
        description="as_routed: the router's weights (MoE++ Eq. 1); nonzero: zero experts weigh nothing, and the "
        "weights of a token's other choices are divided by their sum (AdaMoE; MoE++'s released code)",
    )
    balance_weight: PositiveFloat = Field(
        default=1.0,
        description="weight of these choices in the balance loss, where experts have 1 (MoE++'s tau, Eq. 7)",
    )
    pooled_balance: bool = Field(
        default=False,
        description="the balance loss sees these choices' mean load, so that only their total share matters (AdaMoE)",
    )

    @property
    def total(self) -> int:
        """How many choices these are. They are numbered after the experts: zero, copy, constant."""
        return self.zero_experts + self.copy_experts + self.constant_experts

    @model_validator(mode="after")
    def _there_are_some(self) -> ComputationFreeConfig:
        if self.total == 0:
            raise ValueError("zero_experts, copy_experts and constant_experts are all 0; set one, or leave this out")
        return self


class CapacityConfig(Section):
    """The most tokens of a sequence that an expert takes; what finds no place is dropped."""

    factor: PositiveFloat | None = Field(
        default=None,
        description="capacity = ceil(factor x seq_length x mean number of choices per token / number of choices); "
        "between choices of unequal balance_weight in their ratio (MoE++ Eq. 8)",
    )
    tokens: PositiveInt | None = Field(
        default=None, description="capacity, said outright (`expert_capacity` of Switch Transformers); or `factor`"
    )
    order: Literal["position", "probability"] = Field(
        default="position",
        description="who finds a place: the first tokens of the sequence, so that a causal model stays causal, or "
        "those whose probability of the expert is highest (V-MoE, arXiv 2106.05974; encoders only)",
    )
    dropped: Literal["zero", "input"] = Field(
        default="zero",
        description="what a dropped choice adds to the token: nothing, or the layer's input in the expert's place, "
        "with its weight (Switch Transformers as HyperMoE's released code has them)",
    )
    pad: bool = Field(
        default=False,
        description="exchange buffers filled up to the capacity: equal splits that no rank has to ask for, at the "
        "price of computing the padding; the outputs are the same to the bit",
    )

    @model_validator(mode="after")
    def _said_once(self) -> CapacityConfig:
        if (self.factor is None) == (self.tokens is None):
            raise ValueError(f"set exactly one of factor ({self.factor}) and tokens ({self.tokens})")
        return self


class TokenMaskConfig(Section):
    """Experts that a token may see: drawn for each vocabulary id before training (MaskMoE, arXiv 2407.09816)."""

    frequent_ids: PositiveInt = Field(
        description="token ids below this one count as frequent: SentencePiece numbers its pieces by frequency"
    )
    frequent_experts: PositiveInt = Field(description="experts that a frequent token may see")
    rare_experts: PositiveInt = Field(default=1, description="experts that any other token may see")
    share: Literal["layer", "model"] = Field(
        default="layer", description="whether each layer draws its own masks, or all layers have the same"
    )
    seed: Count = Field(default=0, description="of the draw; part of the model, unlike training.seed")


class RouterStateConfig(Section):
    """What a router remembers of the MoE layer before, for each token."""

    type: Literal["recurrent", "gating_residual"] = Field(
        description="recurrent: a GRU over the layers, shared by them, between the token and the gate (RMoE, arXiv "
        "2408.06793); gating_residual: the gate also sees the scores of the layer before (MoE++ Eq. 6)"
    )
    width: PositiveInt | None = Field(
        default=None,
        description=f"size of the GRU's state (default: {DEFAULT_STATE_WIDTH}); a gating residual's is the number of "
        "choices",
    )

    @model_validator(mode="after")
    def _width_has_a_use(self) -> RouterStateConfig:
        if self.type == "gating_residual" and self.width is not None:
            raise ValueError(f"width ({self.width}) means nothing with type gating_residual; remove it")
        return self


class CartesianConfig(Section):
    """Two mixtures in a row, so that a token's experts are pairs (CartesianMoE, arXiv 2410.16077)."""

    residual: Literal["stream", "inner"] = Field(
        default="stream",
        description="what is added to the second mixture's output: the layer's residual stream alone, or the first "
        "mixture's output as well",
    )


def capacities(moe: MoEConfig, seq_length: int) -> list[int] | None:
    """The most tokens of a sequence that each choice takes; None without `moe.capacity`."""
    if moe.capacity is None:
        return None
    if moe.capacity.tokens is not None:
        return [moe.capacity.tokens] * moe.num_choices
    assert moe.capacity.factor is not None
    places = moe.capacity.factor * seq_length * moe.expected_choices
    return [math.ceil(places * share) for share in expected_shares(moe)]


def expected_shares(moe: MoEConfig) -> list[float]:
    """Share of the choices that each expert, then each computation-free one, gets where the balance loss is least:
    inversely to its weight in the loss (MoE++ Tab. 1: experts get tau E of tau E + Z)."""
    free = moe.computation_free
    weights = [1.0] * moe.num_experts
    if free is not None:
        weights += [1.0 / free.balance_weight] * free.total
    return [weight / sum(weights) for weight in weights]


def state_width(moe: MoEConfig | None) -> int:
    """Numbers that a token carries from one MoE layer's router to the next; 0 without `moe.router_state`."""
    if moe is None or moe.router_state is None:
        return 0
    if moe.router_state.type == "gating_residual":
        return moe.num_choices
    return moe.router_state.width or DEFAULT_STATE_WIDTH


def gate_width(moe: MoEConfig, hidden_size: int) -> int:
    """Size of what the gate multiplies: the token, the GRU's state instead, or token and former scores together."""
    if moe.router_state is None:
        return hidden_size
    recurrent = moe.router_state.type == "recurrent"
    return state_width(moe) if recurrent else hidden_size + state_width(moe)


def relatives_problems(moe: MoEConfig) -> Iterator[str]:
    """What excludes what, in sentences that begin with the setting's name."""
    mask = moe.token_mask
    if mask is not None:
        for name in ("frequent_experts", "rare_experts"):
            if (value := getattr(mask, name)) > moe.num_experts:
                yield f"token_mask.{name} ({value}) must not exceed num_experts ({moe.num_experts})"
        if not moe.router.respects_token_mask:
            yield (
                f"token_mask needs a router that chooses by its scores alone; router.type ({moe.router.type}) as set "
                "does not; legal: top_k, da_moe"
            )
        if moe.router_state is not None and moe.router_state.type == "gating_residual":
            yield (
                "token_mask makes minus infinity of scores that router_state.type (gating_residual) would hand to the "
                "next layer; legal with it: recurrent"
            )
        if moe.computation_free is not None:
            yield "token_mask says nothing about the choices of computation_free; remove one of the two"
    groups = getattr(moe.router, "groups", 1)
    if moe.computation_free is not None and groups > 1:
        yield f"router.groups ({groups}) are groups of experts, which the choices of computation_free are in none of"
    if moe.cartesian is not None and moe.hyper is not None:
        yield "hyper makes an expert of what a token did not select; in a cartesian layer it selects twice; remove one"
    if moe.capacity is not None and moe.capacity.pad and moe.dispatch.max_rows is not None:
        yield (
            f"capacity.pad sends buffers of one fixed size, which dispatch.max_rows ({moe.dispatch.max_rows}) would "
            "cut; remove one of the two"
        )

    yield from _width_problems(moe)


def _width_problems(moe: MoEConfig) -> Iterator[str]:
    widths = moe.expert_widths
    if widths is None:
        return
    if len(widths) != moe.num_experts:
        yield f"expert_widths has {len(widths)} entries; num_experts is {moe.num_experts}"
    elif sum(widths) != moe.num_experts * moe.ffn_hidden_size:
        yield (
            f"expert_widths sums to {sum(widths)}; it must keep the size of num_experts experts of ffn_hidden_size: "
            f"{moe.num_experts} x {moe.ffn_hidden_size} = {moe.num_experts * moe.ffn_hidden_size}"
        )
    if moe.dispatch.max_rows is not None:
        yield (
            f"dispatch.max_rows ({moe.dispatch.max_rows}) cuts the rows of experts of one width; remove it, or "
            "expert_widths"
        )


def ranks_of_equal_size(widths: list[int]) -> list[int]:
    """The numbers of expert ranks that would all hold the same number of hidden units."""
    experts = len(widths)

    def is_even(ranks: int) -> bool:
        local = experts // ranks
        return len({sum(widths[rank * local : (rank + 1) * local]) for rank in range(ranks)}) == 1

    return [ranks for ranks in range(1, experts + 1) if experts % ranks == 0 and is_even(ranks)]


def relatives_used(model: ModelConfig) -> list[str]:
    """The settings of this file that change what the model computes, by path."""
    if model.moe is None:
        return []
    names = ("computation_free", "capacity", "token_mask", "router_state", "expert_widths")
    names += ("shared_expert_ffn_hidden_size", "cartesian")
    return [f"model.moe.{name}" for name in names if getattr(model.moe, name) is not None]
