"""Masks by token, places within a capacity, and padding: what no comparison of whole layers shows."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.config.relatives import TokenMaskConfig
from moetrain.moe.capacity import most_probable_within_capacity, within_capacity
from moetrain.moe.dispatcher import Padding
from moetrain.moe.token_mask import hidden_experts
from moetrain.ops import plan_permutation

MASK = TokenMaskConfig(frequent_ids=100, frequent_experts=3)


class Alone:
    """A tensor group of one."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def places(choices: list[list[list[int]]], capacity: list[int]) -> list[list[list[int]]]:
    """`within_capacity` of choices by position, sequence and slot."""
    ids = torch.tensor(choices, dtype=torch.int64)
    group: dist.ProcessGroup = Alone()  # pyright: ignore[reportAssignmentType]
    kept = within_capacity(ids.flatten(0, 1), torch.tensor(capacity), ids.shape[1], group)
    return kept.view(ids.shape).tolist()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_first_tokens_of_a_sequence_get_an_experts_places(data: st.DataObject) -> None:
    num_experts, sequences, slots = 4, 2, 3
    slot = st.lists(st.integers(0, num_experts - 1), max_size=slots, unique=True)
    tokens = data.draw(st.lists(st.lists(slot, min_size=sequences, max_size=sequences), min_size=1, max_size=9))
    capacity = data.draw(st.lists(st.integers(1, 5), min_size=num_experts, max_size=num_experts))
    padded = [[ids + [-1] * (slots - len(ids)) for ids in row] for row in tokens]
    expected, taken = [], Counter[tuple[int, int]]()
    for row in padded:
        expected.append([])
        for sequence, ids in enumerate(row):
            kept = []
            for expert in ids:
                taken[sequence, expert] += expert >= 0
                kept.append(expert if expert >= 0 and taken[sequence, expert] <= capacity[expert] else -1)
            expected[-1].append(kept)
    assert places(padded, capacity) == expected


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_by_probability_the_surest_tokens_get_an_experts_places_and_of_equals_the_first(data: st.DataObject) -> None:
    num_experts, sequences = 3, 2
    length = data.draw(st.integers(1, 8))
    slot = st.lists(st.integers(0, num_experts - 1), max_size=2, unique=True)
    capacity = data.draw(st.lists(st.integers(1, 4), min_size=num_experts, max_size=num_experts))
    ids = torch.tensor([(s := data.draw(slot)) + [-1] * (2 - len(s)) for _ in range(length * sequences)])
    few = st.sampled_from([0.1, 0.2, 0.3, 0.4])
    probs = torch.tensor([[data.draw(few) for _ in range(num_experts)] for _ in range(length * sequences)])
    expected = torch.full_like(ids, -1)
    for sequence in range(sequences):
        for expert in range(num_experts):
            tokens = range(sequence, length * sequences, sequences)
            asking = sorted((t for t in tokens if expert in ids[t].tolist()), key=lambda t: -float(probs[t, expert]))
            for t in asking[: capacity[expert]]:
                expected[t][ids[t] == expert] = expert
    group: dist.ProcessGroup = Alone()  # pyright: ignore[reportAssignmentType]
    kept = most_probable_within_capacity(ids, probs, torch.tensor(capacity), sequences, group)
    assert kept.tolist() == expected.tolist()


def test_a_token_sees_as_many_experts_as_its_frequency_says() -> None:
    visible = (~hidden_experts(MASK, 300, 8, layer=0)).sum(dim=1)
    assert visible[:100].tolist() == [3] * 100
    assert visible[100:].tolist() == [1] * 200


def test_all_experts_are_seen_by_about_equally_many_tokens() -> None:
    seen = (~hidden_experts(TokenMaskConfig(frequent_ids=1, frequent_experts=2, rare_experts=2), 20000, 8, 3)).sum(
        dim=0
    )
    assert (seen.float() / 5000 - 1).abs().max() < 0.05  # 4.6 standard deviations of 61 tokens


def test_layers_and_seeds_draw_their_own_masks_unless_the_model_shares_one() -> None:
    def mask(layer: int, **changes: object) -> list[list[bool]]:
        return hidden_experts(MASK.model_copy(update=changes), 300, 8, layer).tolist()

    assert mask(0) == mask(0)
    assert mask(0) != mask(1) != mask(0, seed=1)
    assert mask(0, share="model") == mask(1, share="model") != mask(0, share="model", seed=1)


def test_a_mask_is_the_same_in_every_version() -> None:
    """A checkpoint keeps no masks, so these numbers must never change."""
    mask = hidden_experts(TokenMaskConfig(frequent_ids=3, frequent_experts=2, seed=5), 6, 8, layer=2)
    assert [row.logical_not().nonzero().flatten().tolist() for row in mask] == [[0, 3], [0, 7], [4, 7], [5], [3], [1]]


@pytest.mark.parametrize("ranks", [1, 2])
def test_padding_puts_each_row_into_the_buffer_of_its_expert(ranks: int) -> None:
    plan = plan_permutation(torch.tensor([[2, 0], [2, -1], [3, 2]]), 4)
    padding = Padding.of(plan, 4, ranks)
    assert padding.place_R.tolist() == [0, 8, 9, 10, 12]
    assert padding.splits_W == [16 // ranks] * ranks
    rows = torch.arange(1.0, 6.0)[:, None]
    filled = padding.fill(rows)
    assert filled[padding.place_R].equal(rows)
    assert filled.count_nonzero() == 5
    assert padding.arrivals().tokens_per_expert_E.tolist() == [4 * ranks] * (4 // ranks)
