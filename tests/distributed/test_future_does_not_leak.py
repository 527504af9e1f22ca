"""Changing token t leaves the routing and the logits of every earlier token exactly as they were."""

from __future__ import annotations

import pytest
import torch
from parity import SINGLE, layout_of, tiny_config
from pydantic import ValidationError

from moetrain.config.da_moe import CAUSAL_IMPORTANCE, NONCAUSAL_IMPORTANCE
from moetrain.config.schema import RunConfig
from moetrain.moe.layer import MoELayer
from moetrain.ops import CAUSAL_MEASURES, NONCAUSAL_MEASURES
from moetrain.runtime.groups import ParallelGroups, create_groups
from moetrain.testing import run_distributed
from moetrain.train.setup import build_step

BUDGETS = ("mean_k", "paper")
LENGTH, CHANGED = 48, 29


Observation = tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]


def observe_all(many: list[dict]) -> list[list[Observation]]:
    """Run in one process: what `observe` sees of each config."""
    configs = [tiny_config(SINGLE, **{"model__seq_length": LENGTH, **changes}) for changes in many]
    groups = create_groups(layout_of(configs[0]), seed=1)
    return [observe(config, groups) for config in configs]


def observe(config: RunConfig, groups: ParallelGroups) -> list[Observation]:
    """(logits [s, V], expert ids and weights of every MoE layer [s, K]) for a sequence and for the same sequence with
    every token from CHANGED on replaced."""
    step = build_step(config, groups, torch.device("cpu"))
    (decoder,) = step.chunks
    decoder.eval()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for module in decoder.modules():
        if isinstance(module, MoELayer):
            module.router.register_forward_hook(
                lambda _, __, decision: seen.append((decision.expert_ids_TK, decision.weights_TK))
            )
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, config.model.vocab_size, (1, LENGTH), generator=generator)
    other = tokens.clone()
    other[:, CHANGED:] = torch.randint(0, config.model.vocab_size, (1, LENGTH - CHANGED), generator=generator)
    results = []
    for sequence in (tokens, other):
        seen.clear()
        with torch.no_grad():
            logits = decoder(sequence, torch.arange(LENGTH)[None], None)[0]
        results.append((logits, [ids for ids, _ in seen], [weights for _, weights in seen]))
    return results


def check(changes: dict) -> None:
    compare(run_distributed(observe_all, 1, [changes])[0][0])


def compare(observed: list[Observation], routers: int = 3) -> None:
    (logits, ids, weights), (other_logits, other_ids, other_weights) = observed
    assert torch.equal(logits[:CHANGED], other_logits[:CHANGED])
    assert not torch.equal(logits[CHANGED:], other_logits[CHANGED:])
    assert len(ids) == routers
    for mine, theirs in zip([*ids, *weights], [*other_ids, *other_weights], strict=True):
        assert torch.equal(mine[:CHANGED], theirs[:CHANGED])
    # The experiment must be able to fail: later tokens do route differently, and rows per expert change with them.
    assert any(not torch.equal(mine[CHANGED:], theirs[CHANGED:]) for mine, theirs in zip(ids, other_ids, strict=True))


@pytest.mark.parametrize("form", ["auto", "grouped", "factorized"])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("importance", CAUSAL_IMPORTANCE)
def test_no_causal_importance_lets_the_future_change_the_past(importance: str, budget: str, form: str) -> None:
    check(
        {
            "model__moe__router": {"type": "da_moe", "importance": importance, "budget": budget},
            "model__moe__hyper__form": form,
        }
    )


def test_rounds_of_a_few_rows_do_not_let_the_future_change_the_past() -> None:
    check({"model__moe__dispatch": {"max_rows": 5}})


def test_plain_top_k_does_not_let_the_future_change_the_past() -> None:
    check({"model__moe__router": {"type": "top_k", "top_k": 2}})


def test_the_configs_importances_are_the_ops_and_their_causality_agrees() -> None:
    assert set(CAUSAL_IMPORTANCE) == set(CAUSAL_MEASURES)
    assert set(NONCAUSAL_IMPORTANCE) <= set(NONCAUSAL_MEASURES)


@pytest.mark.parametrize("importance", NONCAUSAL_IMPORTANCE)
def test_a_noncausal_importance_is_refused_in_a_causal_model_with_the_reason(importance: str) -> None:
    with pytest.raises(ValidationError, match="leak its future"):
        tiny_config(SINGLE, model__moe__router={"type": "da_moe", "importance": importance})
