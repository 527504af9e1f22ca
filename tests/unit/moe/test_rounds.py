"""The cut of an exchange into rounds, against rows that are dealt out one by one."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moetrain.moe.round_trips import by_rounds
from moetrain.moe.rounds import Rounds, plan_rounds
from moetrain.ops import plan_permutation


@st.composite
def counts_and_limits(draw: st.DrawFn) -> tuple[Tensor, int | None]:
    """Rows [W, E] that each rank has for each expert, and `max_rows`."""
    ranks, local = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    rows = st.lists(st.integers(0, 7), min_size=ranks * local, max_size=ranks * local)
    counts = draw(st.lists(rows, min_size=ranks, max_size=ranks))
    return torch.tensor(counts, dtype=torch.int64), draw(st.none() | st.integers(1, 9))


def dealt_one_by_one(counts_WE: Tensor, max_rows: int | None) -> list[list[list[tuple[int, int, int]]]]:
    """[destination][round]: the (local expert, source, position) of each row that arrives."""
    ranks = counts_WE.shape[0]
    local = counts_WE.shape[1] // ranks
    arriving = [
        [
            (expert, source, position)
            for expert in range(local)
            for source in range(ranks)
            for position in range(int(counts_WE[source, destination * local + expert]))
        ]
        for destination in range(ranks)
    ]
    size = max_rows or max(1, *map(len, arriving))
    number = max(1, *(-(-len(rows) // size) for rows in arriving))
    return [[rows[n * size : (n + 1) * size] for n in range(number)] for rows in arriving]


def all_ranks(counts_WE: Tensor, max_rows: int | None) -> list[Rounds]:
    return [plan_rounds(counts_WE, rank, max_rows) for rank in range(counts_WE.shape[0])]


@given(counts_and_limits())
def test_every_rank_sends_and_receives_what_dealing_row_by_row_gives(case: tuple[Tensor, int | None]) -> None:
    counts_WE, max_rows = case
    dealt = dealt_one_by_one(counts_WE, max_rows)
    ranks = counts_WE.shape[0]
    for rank, rounds in enumerate(all_ranks(counts_WE, max_rows)):
        assert len(rounds) == len(dealt[rank])
        for n in range(len(rounds)):
            assert rounds.sent_NW[n] == [sum(s == rank for _, s, _ in dealt[to][n]) for to in range(ranks)]
            assert rounds.received_NW[n] == [sum(s == source for _, s, _ in dealt[rank][n]) for source in range(ranks)]
            for source in range(ranks):
                for expert, rows in enumerate(rounds.arriving_NWL[n, source].tolist()):
                    assert rows == sum((e, s) == (expert, source) for e, s, _ in dealt[rank][n])


@given(counts_and_limits())
def test_no_round_brings_more_than_max_rows_and_all_rounds_together_bring_every_row(
    case: tuple[Tensor, int | None],
) -> None:
    counts_WE, max_rows = case
    ranks = counts_WE.shape[0]
    for rank, rounds in enumerate(all_ranks(counts_WE, max_rows)):
        assert max_rows is None or all(sum(received) <= max_rows for received in rounds.received_NW)
        mine_WL = counts_WE.view(ranks, ranks, -1)[:, rank]
        assert torch.equal(rounds.arriving_NWL.sum(dim=0), mine_WL)


@given(counts_and_limits())
def test_a_rounds_experts_are_those_with_rows_and_is_cut_tells_of_the_last_ones_rest(
    case: tuple[Tensor, int | None],
) -> None:
    counts_WE, max_rows = case
    dealt = dealt_one_by_one(counts_WE, max_rows)
    for rank, rounds in enumerate(all_ranks(counts_WE, max_rows)):
        for n, rows in enumerate(dealt[rank]):
            experts = [e for e, _, _ in rows]
            assert rounds.experts(n) == (range(experts[0], experts[-1] + 1) if rows else range(0))
            following = dealt[rank][n + 1] if n + 1 < len(rounds) else []
            assert rounds.is_cut(n) == bool(rows and following and rows[-1][0] == following[0][0])


@given(st.integers(0, 12), st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**31))
def test_rows_by_round_are_the_same_slots_with_each_round_in_one_piece(
    tokens: int, slots: int, max_rows: int, seed: int
) -> None:
    ids_TK = torch.randint(-1, 4, (tokens, slots), generator=torch.Generator().manual_seed(seed))
    plan = plan_permutation(ids_TK, 4)
    counts_WE = plan.tokens_per_expert_E.repeat(2, 1)  # two ranks with equal counts
    rounds = plan_rounds(counts_WE, 1, max_rows)
    ordered = by_rounds(plan, rounds)
    assert torch.equal(ordered.slot_row_TK < 0, ids_TK < 0)
    for row, (token, slot) in enumerate(zip(ordered.row_token_R, ordered.row_slot_R, strict=True)):
        assert int(slot) // slots == int(token)
        assert int(ordered.slot_row_TK.view(-1)[slot]) == row
    destinations = ids_TK.view(-1)[ordered.row_slot_R] // 2
    sent = [[w] * rows for sent_W in rounds.sent_NW for w, rows in enumerate(sent_W)]
    assert destinations.tolist() == [w for piece in sent for w in piece]
