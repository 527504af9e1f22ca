"""Dispatch in rounds and under other work: the same numbers, a ceiling on memory, no hang, in every layout."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from allocations import peak_scratch
from parity import LAYOUTS, SINGLE, Layout, Trajectory, differences, tiny_config, train_all
from torch import Tensor

from moetrain.config.moe import DispatchConfig
from moetrain.moe import dispatcher as dispatcher_module
from moetrain.moe.dispatcher import TokenDispatcher
from moetrain.moe.experts import GroupedExperts
from moetrain.moe.memory import dispatch_bound
from moetrain.testing import run_distributed

EXPERTS, D, F = 8, 16, 12
BOUND = 1e-5


# --- one layer's dispatch ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """One rank's tokens and what becomes of them."""

    x_TD: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    grad_TD: Tensor


def make_tokens(tokens: int, slots: int, dtype: torch.dtype, ids_TK: Tensor | None = None, seed: int = 0) -> Tokens:
    """Random tokens of this rank; without `ids_TK` with one to `slots` distinct experts each."""
    generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    if ids_TK is None:
        ids_TK = torch.rand(tokens, EXPERTS, generator=generator).argsort(dim=1)[:, :slots].contiguous()
        ids_TK[torch.arange(slots) > torch.randint(0, slots, (tokens, 1), generator=generator)] = -1
    x_TD, grad_TD = (torch.randn(tokens, D, generator=generator).to(dtype) for _ in range(2))
    return Tokens(x_TD, ids_TK, torch.rand(ids_TK.shape, generator=generator), grad_TD)


def make_experts(dtype: torch.dtype, hidden: int = D, ffn: int = F, num_experts: int = EXPERTS) -> GroupedExperts:
    """This rank's part of the same experts whatever the number of ranks."""
    generator = torch.Generator().manual_seed(7)
    local = num_experts // dist.get_world_size()
    experts = GroupedExperts(local, hidden, ffn, dtype)
    with torch.no_grad():
        for weight in experts.parameters():
            every = torch.randn(num_experts, *weight.shape[1:], generator=generator) * 0.3
            weight.copy_(every[dist.get_rank() * local :][:local])
    return experts


def make_dispatcher(max_rows: int | None, overlap: bool, num_experts: int = EXPERTS) -> TokenDispatcher:
    assert dist.group.WORLD is not None
    return TokenDispatcher(num_experts, dist.group.WORLD, DispatchConfig(max_rows=max_rows, overlap=overlap))


def outcome(tokens: Tokens, max_rows: int | None, overlap: bool) -> tuple[int, list[Tensor]]:
    """Number of rounds; output and the gradients of tokens, weights, fc1 and fc2."""
    experts = make_experts(tokens.x_TD.dtype)
    dispatcher = make_dispatcher(max_rows, overlap)
    x_TD, weights_TK = tokens.x_TD.clone().requires_grad_(), tokens.weights_TK.clone().requires_grad_()
    dispatch = dispatcher.start(x_TD, tokens.ids_TK)
    y_TD = dispatcher.finish(dispatch, weights_TK, experts)
    y_TD.backward(tokens.grad_TD)
    results = [y_TD.detach(), x_TD.grad, weights_TK.grad, experts.fc1.grad, experts.fc2.grad]
    return len(dispatch.rounds), [t for t in results if t is not None]


def routings(slots: int) -> list[Tensor | None]:
    """Random; all to one expert of the last rank; nothing used; this rank without tokens (rank 0 and the last)."""
    to_one = torch.full((9, slots), -1)
    to_one[:, 0] = EXPERTS - 1
    at_end = dist.get_rank() in (0, dist.get_world_size() - 1)
    return [None, to_one, torch.full((5, slots), -1), torch.empty(0, slots, dtype=torch.int64) if at_end else None]


def every_form(dtype: torch.dtype, slots: int) -> list[dict[str, Any]]:
    """For each routing what each form of dispatch gives."""
    results = []
    for number, ids_TK in enumerate(routings(slots)):
        tokens = make_tokens(23 + dist.get_rank() if ids_TK is None else len(ids_TK), slots, dtype, ids_TK, number)
        forms = {(m, o): outcome(tokens, m, o) for m in (None, 7) for o in (False, True)}
        results.append({"tokens": tokens, "forms": forms})
    return results


@lru_cache
def forms_of(world: int, dtype: torch.dtype) -> list[list[dict[str, Any]]]:
    return run_distributed(every_form, world, dtype, 3)


WORLDS = pytest.mark.parametrize("world", [1, 2, 4])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@WORLDS
@DTYPES
def test_overlap_changes_no_bit_of_output_or_gradient(world: int, dtype: torch.dtype) -> None:
    for rank in forms_of(world, dtype):
        for routing in rank:
            for max_rows in (None, 7):
                plain, overlapped = (routing["forms"][max_rows, overlap] for overlap in (False, True))
                assert plain[0] == overlapped[0]
                for mine, theirs in zip(plain[1], overlapped[1], strict=True):
                    assert torch.equal(mine, theirs)


@WORLDS
@DTYPES
def test_rounds_give_the_same_output_to_the_bit_and_gradients_to_rounding(world: int, dtype: torch.dtype) -> None:
    most_rounds = 0
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for rank in forms_of(world, dtype):
        for routing in rank:
            (_, whole), (rounds, cut) = routing["forms"][None, True], routing["forms"][7, True]
            most_rounds = max(most_rounds, rounds)
            assert torch.equal(whole[0], cut[0])
            for mine, theirs in zip(whole[1:], cut[1:], strict=True):
                assert float((mine - theirs).float().norm()) <= tolerance * float(mine.float().norm())
    assert most_rounds >= 3


@WORLDS
@DTYPES
def test_dispatch_is_each_tokens_weighted_sum_of_its_experts(world: int, dtype: torch.dtype) -> None:
    """Against every expert applied to every token, in float64, and torch's own gradient of it."""
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    fc1, fc2 = run_distributed(whole_weights, 1, dtype)[0]
    results = forms_of(world, dtype)
    for number in range(len(results[0])):
        fc1_total, fc2_total = torch.zeros_like(fc1), torch.zeros_like(fc2)
        for rank in results:
            tokens, (_, found) = rank[number]["tokens"], rank[number]["forms"][7, True]
            inputs = (tokens.x_TD, tokens.weights_TK, fc1, fc2)
            x, w, f1, f2 = (t.double().clone().requires_grad_() for t in inputs)
            expected = by_the_definition(x, tokens.ids_TK, w, f1, f2)
            expected.backward(tokens.grad_TD.double())
            for mine, theirs in zip(found[:3], (expected.detach(), x.grad, w.grad), strict=True):
                assert_near(mine, theirs, tolerance)
            fc1_total += f1.grad
            fc2_total += f2.grad
        for index, total in ((3, fc1_total), (4, fc2_total)):
            assert_near(torch.cat([rank[number]["forms"][7, True][1][index] for rank in results]), total, tolerance)


def whole_weights(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    experts = make_experts(dtype)
    return experts.fc1.detach().double(), experts.fc2.detach().double()


def by_the_definition(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    gate_TEF, up_TEF = torch.einsum("td,efd->tef", x_TD, fc1).chunk(2, dim=-1)
    every_TED = torch.einsum("tef,edf->ted", torch.nn.functional.silu(gate_TEF) * up_TEF, fc2)
    rows_TKD = every_TED.gather(1, ids_TK.clamp(min=0)[..., None].expand(-1, -1, x_TD.shape[1]))
    return (rows_TKD * (weights_TK * (ids_TK >= 0))[..., None]).sum(dim=1)


def assert_near(mine: Tensor, theirs: Tensor | None, tolerance: float) -> None:
    assert theirs is not None
    assert float((mine.double() - theirs).norm()) <= tolerance * float(theirs.norm())


def rounding_of_many_rounds() -> tuple[float, float]:
    """Relative error of fc1's bf16 gradient in one round and in more than two hundred, against float64."""
    tokens = make_tokens(900, 1, torch.bfloat16, torch.zeros(900, 1, dtype=torch.int64))
    one, many = (outcome(tokens, max_rows, overlap=False)[1][3] for max_rows in (None, 4))
    fc1, fc2 = (w.requires_grad_() for w in whole_weights(torch.bfloat16))
    expected = by_the_definition(tokens.x_TD.double(), tokens.ids_TK, tokens.weights_TK.double(), fc1, fc2)
    (exact,) = torch.autograd.grad(expected, fc1, tokens.grad_TD.double())
    return tuple(float((g.double() - exact).norm() / exact.norm()) for g in (one, many))  # pyright: ignore


def test_hundreds_of_rounds_round_a_bf16_gradient_no_worse_than_one() -> None:
    one, many = run_distributed(rounding_of_many_rounds, 1)[0]
    print(f"relative error of the gradient: one round {one:.1e}, 225 rounds {many:.1e}")
    assert many < 1.5 * one


# --- no hang ----------------------------------------------------------------------------------------------------------


def many_iterations() -> float:
    """200 layers' worth of uneven exchanges; the seconds they took."""
    start = time.monotonic()
    world, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(0)  # the same on every rank
    for step in range(200):
        sizes = torch.randint(0, 12, (world,), generator=generator)
        sizes[torch.randint(0, world, (), generator=generator)] = 0
        dtype = (torch.float32, torch.bfloat16)[step % 2]
        max_rows, overlap = ((None, True), (5, True), (None, False), (5, False))[step % 4]
        _, results = outcome(make_tokens(int(sizes[rank]), 1 + step % 3, dtype, seed=step), max_rows, overlap)
        assert len(results) == 5
    return time.monotonic() - start


def test_two_hundred_uneven_dispatches_and_backwards_on_four_ranks_do_not_hang() -> None:
    seconds = max(run_distributed(many_iterations, 4, timeout=180.0))
    print(f"200 iterations took {seconds:.1f} s")


# --- memory -----------------------------------------------------------------------------------------------------------


def balanced(tokens: int, slots: int, num_experts: int) -> Tensor:
    return (torch.arange(tokens)[:, None] + torch.arange(slots)) % num_experts


def zipf(tokens: int, slots: int, num_experts: int) -> Tensor:
    generator = torch.Generator().manual_seed(dist.get_rank())
    popularity = (1.0 / torch.arange(1, num_experts + 1)).expand(tokens, -1)
    return torch.multinomial(popularity, slots, generator=generator)


def all_to_one(tokens: int, slots: int, num_experts: int) -> Tensor:
    """An expert of a rank whose own rows arrive neither first nor last."""
    ids_TK = torch.full((tokens, slots), -1)
    ids_TK[:, 0] = dist.get_world_size() // 2 * (num_experts // dist.get_world_size())
    return ids_TK


def few_between_many(tokens: int, slots: int, num_experts: int) -> Tensor:
    """All to the last expert and to the first but for a few tokens, so that one round meets every expert."""
    ids_TK = torch.stack([torch.zeros(tokens, dtype=torch.int64), torch.full((tokens,), num_experts - 1)], dim=1)
    ids_TK[: num_experts - 2, 0] = torch.arange(1, num_experts - 1)
    return ids_TK


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer, and the routing that fills its bound (None: no routing can)."""

    world: int
    tokens: int
    slots: int
    num_experts: int
    hidden: int
    ffn: int
    max_rows: int | None
    worst: Callable[[int, int, int], Tensor] | None

    def routings(self) -> list[Callable[[int, int, int], Tensor]]:
        known = [balanced, zipf, all_to_one]
        return known if self.worst is None or self.worst in known else [*known, self.worst]


SHAPES = [
    Shape(1, 512, 2, 4, 64, 96, None, balanced),
    Shape(1, 512, 2, 4, 64, 96, 300, few_between_many),
    Shape(1, 400, 2, 4, 32, 160, 150, few_between_many),
    Shape(4, 512, 1, 4, 64, 96, None, all_to_one),
    Shape(4, 512, 1, 4, 64, 96, 512, all_to_one),
    Shape(4, 512, 1, 4, 128, 32, 512, all_to_one),
    Shape(4, 300, 3, 8, 96, 64, 200, None),
]


def measure_peaks(shape: Shape, dtype: torch.dtype, overlap: bool) -> dict[str, tuple[int, int]]:
    """Peak of forward and backward for each routing: the least and the most of three measurements, which differ where
    a thread of gloo is the last to give a tensor back (see `peak_scratch`)."""
    sizes = (shape.tokens, shape.slots, shape.num_experts)
    peaks = {}
    for routing in shape.routings():
        experts = make_experts(dtype, shape.hidden, shape.ffn, shape.num_experts)
        dispatcher = make_dispatcher(shape.max_rows, overlap, shape.num_experts)
        ids_TK = routing(*sizes)
        x_TD = torch.randn(shape.tokens, shape.hidden, dtype=dtype, requires_grad=True)
        weights_TK = torch.rand(shape.tokens, shape.slots, requires_grad=True)
        grad_TD = torch.randn(shape.tokens, shape.hidden, dtype=dtype)

        def step() -> Tensor:
            y_TD = dispatcher.finish(dispatcher.start(x_TD, ids_TK), weights_TK, experts)  # noqa: B023
            y_TD.backward(grad_TD)  # noqa: B023
            return y_TD

        def forget() -> None:
            for tensor in (x_TD, weights_TK, *experts.parameters()):  # noqa: B023
                tensor.grad = None

        found = []
        for _ in range(3):
            forget()
            found.append(peak_scratch(step))
        peaks[routing.__name__] = (min(found), max(found))
    return peaks


def measure_all_peaks(shape: Shape) -> dict[tuple[torch.dtype, bool], dict[str, tuple[int, int]]]:
    """`measure_peaks` for both dtypes, plain and with overlap where rows travel, in one launch."""
    return {
        (dtype, overlap): measure_peaks(shape, dtype, overlap)
        for dtype in (torch.float32, torch.bfloat16)
        for overlap in (False, True)[: min(shape.world, 2)]
    }


@lru_cache
def peaks_of(shape: Shape) -> list[dict[tuple[torch.dtype, bool], dict[str, tuple[int, int]]]]:
    return run_distributed(measure_all_peaks, shape.world, shape)


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.world}x{s.tokens}x{s.slots}-{s.hidden}-{s.max_rows}")
def test_no_routing_takes_more_memory_than_the_bound_and_the_worst_takes_it_all(
    shape: Shape, dtype: torch.dtype, overlap: bool
) -> None:
    bound = dispatch_bound(
        shape.tokens,
        shape.slots,
        shape.num_experts // shape.world,
        shape.hidden,
        shape.ffn,
        "fp32" if dtype == torch.float32 else "bf16",
        shape.max_rows,
        shape.world,
        overlap,
    )
    ranks = [peaks[dtype, overlap and shape.world > 1] for peaks in peaks_of(shape)]
    least, most = ({name: max(r[name][i] for r in ranks) / bound.total for name in ranks[0]} for i in (0, 1))
    print({name: f"{least[name]:.3f} to {most[name]:.3f}" for name in least}, bound)
    assert max(least.values()) <= 1.0
    if shape.worst is not None:
        assert most[shape.worst.__name__] >= 0.95


# --- whole models -----------------------------------------------------------------------------------------------------

VARIANTS = ((1, True), (1, False), (2, True))


def train_and_count(configs: list[Any]) -> tuple[list[Trajectory], int]:
    """The trajectories, and the most rounds that any layer had."""
    most = 0
    whole = dispatcher_module.plan_rounds

    def counting(*arguments: Any) -> Any:
        nonlocal most
        rounds = whole(*arguments)
        most = max(most, len(rounds))
        return rounds

    dispatcher_module.plan_rounds = counting
    return train_all(configs), most


@lru_cache
def reference() -> Trajectory:
    return run_distributed(train_all, 1, [tiny_config(SINGLE)])[0][0]


def in_rounds(layout: Layout, zero: int = 1, overlap: bool = True, **changes: object) -> Any:
    return tiny_config(layout, zero, model__moe__dispatch={"max_rows": 7, "overlap": overlap}, **changes)


@pytest.mark.parametrize("name", ["single", "ep2", "ep4", "tp2 x ep2", "tp2+sp x ep2", "pp2 x ep2"])
def test_rounds_keep_the_trajectory_of_one_process_and_overlap_keeps_its_bits(name: str) -> None:
    layout = next(layout for layout in [SINGLE, *LAYOUTS] if layout.name == name)
    configs = [in_rounds(layout, zero, overlap) for zero, overlap in VARIANTS]
    runs, rounds = run_distributed(train_and_count, layout.world, configs)[0]
    assert rounds >= 3
    for run in runs:
        assert run.controllers == reference().controllers
        assert max(differences(run, reference())) <= BOUND
    overlapped, plain, _ = runs
    assert overlapped.losses == plain.losses
    assert overlapped.norms == plain.norms
    for weight, same in zip(overlapped.weights.values(), plain.weights.values(), strict=True):
        assert torch.equal(weight, same)


@pytest.mark.parametrize("name", ["tp2+sp x ep2", "pp2 x ep2"])
def test_rounds_and_overlap_agree_with_full_recompute(name: str) -> None:
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    run = run_distributed(train_all, layout.world, [in_rounds(layout, model__recompute="full")])[0][0]
    assert max(differences(run, reference())) <= BOUND
