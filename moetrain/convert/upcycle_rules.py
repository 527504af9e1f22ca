"""From which model to which one weights can be carried without changing what is computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moetrain.checkpoint.compatibility import model_differences
from moetrain.config.da_moe import DAMoERouterConfig
from moetrain.config.loader import config_to_dict
from moetrain.config.model import ModelConfig
from moetrain.config.moe import MoEConfig
from moetrain.config.relatives import capacities
from moetrain.config.routers import ExpertBiasRouterConfig, TopKRouterConfig
from moetrain.config.routing import RouterConfig
from moetrain.config.schema import RunConfig
from moetrain.errors import ConversionError

# Decided layer by layer, or of no consequence for what a weight means.
_JUDGED_ELSEWHERE = frozenset({"model.moe", "model.moe.layer_freq", "model.seq_length"})
# Settings of a branch beside the experts, which starts at zero where the source lacks it.
_BRANCHES = ("hyper", "shared_expert_ffn_hidden_size")
_ROUTER = "model.moe.router."
# What a layer of copied MLPs cannot have, and why.
_SPOILS_COPIES = {
    "computation_free": "choices beside the experts would take a part of the weights",
    "capacity": "tokens without a place would lose their MLP",
    "cartesian": "a layer would apply the MLP twice",
    "expert_widths": "experts of several widths cannot all be copies of one MLP",
}


@dataclass(frozen=True)
class Transition:
    """What changes between two models that an upcycling may join.

    Attributes:
        new_moe_layers: global numbers of the layers whose MLP becomes experts.
        router_changes: whether MoE layers of the source get another router.
        changes: what makes the logits differ, in sentences; empty when the function is preserved.
    """

    new_moe_layers: tuple[int, ...]
    router_changes: bool
    changes: tuple[str, ...]


def plan_transition(source: RunConfig, target: RunConfig, allow_change: bool) -> Transition:
    """What an upcycling from `source` to `target` has to do.

    With `allow_change`, another router, gates that do not sum to 1 and other capacities are told in `changes` instead
    of refused.

    Raises:
        ConversionError: lists everything in which the models do not fit together, with both values.
    """
    old, new = source.model, target.model
    if new.moe is None:
        raise ConversionError("the target is a dense model (no model.moe): there is nothing to upcycle to")
    becoming = tuple(i for i in range(new.num_layers) if new.is_moe_layer(i) and not _is_moe(old, i))
    problems, changes = [], []
    differences = model_differences(config_to_dict(source), config_to_dict(target))
    different = [difference for difference in differences if not _fits(difference[0], source)]
    routers = [_told(*d) for d in different if d[0].startswith(_ROUTER)]
    problems += [_told(*d) for d in different if not d[0].startswith(_ROUTER) and not _same_groups(d[0], old, new)]
    if routers:
        changes.append(f"another router decides ({'; '.join(routers)})")
    if lost := [str(i) for i in range(new.num_layers) if _is_moe(old, i) and not new.is_moe_layer(i)]:
        problems.append(f"model.moe.layer_freq: layers {', '.join(lost)} have experts in the source and an MLP here")
    if becoming:
        problems += _copy_problems(old, new.moe)
        changes += [reason for reason in [_gate_problem(new.moe.router)] if reason]
    elif not (problems or changes or _adds_a_branch(old.moe, new.moe)):
        problems.append(
            "the target adds nothing to the source; start from the source with checkpoint.load and "
            "checkpoint.load_weights_only=true"
        )
    if old.moe is not None and capacities(old.moe, old.seq_length) != capacities(old.moe, new.seq_length):
        changes.append(
            f"model.seq_length ({new.seq_length}; {old.seq_length} in the source) gives the experts of "
            "model.moe.capacity.factor other places"
        )
    if changes and not allow_change:
        problems += [f"{change}; --allow-change accepts that the logits differ" for change in changes]
    if problems:
        raise ConversionError("the source cannot become the target:\n" + "\n".join(f"  - {p}" for p in problems))
    return Transition(becoming, bool(routers), tuple(changes))


def _told(path: str, there: str, here: str) -> str:
    """A difference in words."""
    return f"{path}: {there} in the source, {here} in the target"


def _fits(path: str, source: RunConfig) -> bool:
    """Whether a difference is what an upcycling is for: a branch that the source lacks and that starts at zero."""
    if path in _JUDGED_ELSEWHERE:
        return True
    moe = source.model.moe
    name = path.removeprefix("model.moe.")
    return moe is not None and name in _BRANCHES and getattr(moe, name) is None


def _adds_a_branch(old: MoEConfig | None, new: MoEConfig) -> bool:
    return old is not None and any(getattr(old, name) is None and getattr(new, name) is not None for name in _BRANCHES)


def _same_groups(path: str, old: ModelConfig, new: ModelConfig) -> bool:
    """Whether the difference is only that one config leaves a default out that the other one writes."""
    return path == "model.num_query_groups" and old.kv_heads == new.kv_heads


def _is_moe(model: ModelConfig, layer: int) -> bool:
    return layer < model.num_layers and model.is_moe_layer(layer)


def _copy_problems(old: ModelConfig, moe: MoEConfig) -> Iterator[str]:
    """Why experts cannot be copies of an MLP."""
    if moe.ffn_hidden_size != old.ffn_hidden_size:
        yield (
            f"model.moe.ffn_hidden_size ({moe.ffn_hidden_size}) must be the source's model.ffn_hidden_size "
            f"({old.ffn_hidden_size}), because each expert starts as a copy of the whole MLP"
        )
    for name, reason in _SPOILS_COPIES.items():
        if getattr(moe, name) is not None:
            yield f"model.moe.{name} must be absent where an MLP becomes experts: {reason}"
    if old.moe is not None and old.moe.hyper is not None:
        yield (
            "model.moe.layer_freq: the source's hypernetwork is trained, so in a layer that only now becomes MoE its "
            "generated expert would not be zero"
        )


def _gate_problem(router: RouterConfig) -> str | None:
    """Why the weights of a token's experts do not sum to 1, which equal experts need to be the MLP; None: they do."""
    if not isinstance(router, TopKRouterConfig | ExpertBiasRouterConfig | DAMoERouterConfig):
        return (
            f"{_ROUTER}type ({router.type}) does not give weights that sum to 1, so the copies would not add up to the "
            "MLP; legal: top_k, expert_bias and da_moe"
        )
    if router.gates != "renormalized":
        return (
            f"{_ROUTER}gates ({router.gates}) would scale the MLP by the probability of the selected experts; legal: "
            "renormalized"
        )
    if not isinstance(router, DAMoERouterConfig) and router.scaling_factor != 1.0:
        return f"{_ROUTER}scaling_factor ({router.scaling_factor:g}) would scale the MLP; legal: 1"
    return None
