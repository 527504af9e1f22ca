"""The ceiling of memory holds for padded exchanges and for experts of different widths too."""

from __future__ import annotations

import pytest
import torch
from allocations import peak_scratch

from moetrain.config.layout import ParallelLayout
from moetrain.config.moe import DispatchConfig
from moetrain.moe.dispatcher import TokenDispatcher
from moetrain.moe.diverse_experts import DiverseExperts
from moetrain.moe.experts import GroupedExperts
from moetrain.moe.memory import dispatch_bound
from moetrain.runtime.groups import create_groups
from moetrain.testing import run_distributed

TOKENS, EXPERTS, HIDDEN = 512, 4, 64
WIDTHS = [80, 16, 80, 16]


def routings(slots: int, per_expert: int | None) -> list[torch.Tensor]:
    """Every expert alike; and all tokens to the first experts, the widest of all among them, as far as they may."""
    tokens = torch.arange(TOKENS)[:, None]
    alike = (tokens + torch.arange(slots)) % EXPERTS
    same = torch.arange(slots).repeat(TOKENS, 1)
    if per_expert is not None:
        same[per_expert:] = -1
    return [alike, same]


def peaks(world: int, slots: int, padded_rows: int | None, kind: str) -> list[tuple[int, int]]:
    """Peak of forward and backward for each routing: least and most of three measurements."""
    groups = create_groups(ParallelLayout(world, expert=world), seed=1)
    local = EXPERTS // world
    if kind == "diverse":
        experts = DiverseExperts(WIDTHS[groups.coordinates.expert * local :][:local], HIDDEN, torch.float32)
    else:
        activation = "relu" if kind == "relu" else "swiglu"
        experts = GroupedExperts(local, HIDDEN, sum(WIDTHS) // EXPERTS, torch.float32, activation)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    dispatcher = TokenDispatcher(EXPERTS, groups.expert, DispatchConfig(overlap=False))
    found = []
    for ids_TK in routings(slots, padded_rows):
        x_TD = torch.randn(TOKENS, HIDDEN, requires_grad=True)
        weights_TK = torch.rand(TOKENS, slots, requires_grad=True)
        grad_TD = torch.randn(TOKENS, HIDDEN)

        def step() -> torch.Tensor:
            dispatch = dispatcher.start(x_TD, ids_TK, padded_rows)  # noqa: B023
            y_TD = dispatcher.finish(dispatch, weights_TK, experts)  # noqa: B023
            y_TD.backward(grad_TD)  # noqa: B023
            return y_TD

        measured = []
        for _ in range(3):
            for tensor in (x_TD, weights_TK, *experts.parameters()):
                tensor.grad = None
            measured.append(peak_scratch(step))
        found.append((min(measured), max(measured)))
    return found


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("slots", "padded_rows", "kind"),
    [(2, 320, "swiglu"), (1, None, "diverse"), (2, 320, "diverse"), (2, None, "relu")],
)
def test_no_routing_takes_more_than_the_bound_and_the_worst_more_than_half_of_it(
    world: int, slots: int, padded_rows: int | None, kind: str
) -> None:
    bound = dispatch_bound(
        tokens=TOKENS,
        max_k=slots,
        num_experts_local=EXPERTS // world,
        hidden=HIDDEN,
        ffn=max(WIDTHS) if padded_rows is None and kind == "diverse" else sum(WIDTHS) // EXPERTS,
        precision="fp32",
        max_rows=None,
        expert_ranks=world,
        overlap=False,
        padded_rows=padded_rows,
        diverse_width=sum(WIDTHS) // world if kind == "diverse" else None,
        gated=kind != "relu",
    )
    # What gloo's threads give back late moves a measurement either way (see `peak_scratch`).
    found = [peak for rank in run_distributed(peaks, world, world, slots, padded_rows, kind) for peak in rank]
    most = max(low for low, _ in found)
    print(f"{world} {padded_rows} {kind}: {most} of {bound.total}")
    assert most <= bound.total
    assert max(high for _, high in found) >= 0.5 * bound.total
