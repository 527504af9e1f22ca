"""What the bound says; that it is true is shown by tests/distributed/test_dispatch.py."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest

from moetrain.moe.memory import DispatchBound, dispatch_bound

SIZES = {"tokens": 4096, "max_k": 2, "num_experts_local": 8, "hidden": 1024, "ffn": 512, "precision": "bf16"}


def bound(**changes: object) -> DispatchBound:
    return dispatch_bound(**{**SIZES, "max_rows": None, "expert_ranks": 8, **changes})  # pyright: ignore


def test_the_parts_without_what_is_kept_add_up_to_the_total() -> None:
    found = bound(max_rows=1000)
    assert found.total == sum(getattr(found, field.name) for field in fields(found) if field.name != "kept")
    assert 0 < found.kept < found.total


def test_one_rows_round_keeps_next_to_nothing() -> None:
    assert bound(max_rows=1).kept < bound().kept / 100


def test_without_a_limit_activations_grow_with_the_ranks_and_with_one_they_do_not() -> None:
    free = [bound(expert_ranks=ranks).experts for ranks in (8, 64)]
    assert free[1] == 8 * free[0]
    limited = [bound(max_rows=4096, expert_ranks=ranks).experts for ranks in (8, 64)]
    assert limited[1] == limited[0] < free[0] / 10


def test_a_limit_that_no_routing_reaches_costs_nothing() -> None:
    most = 8 * SIZES["tokens"] * SIZES["max_k"]
    assert bound(max_rows=most) == bound()
    assert bound(max_rows=most - 1) != bound()


def test_a_token_counts_once_for_each_local_expert_at_most() -> None:
    assert bound(max_k=16, num_experts_local=1).experts == bound(max_k=1, num_experts_local=1).experts


@pytest.mark.parametrize("max_rows", [1, 4096])
def test_overlap_pays_with_travelling_rows_only_and_not_at_all_on_one_rank(max_rows: int) -> None:
    plain, overlapped = (bound(max_rows=max_rows, overlap=overlap) for overlap in (False, True))
    assert overlapped.total > plain.total
    assert overlapped.kept == plain.kept
    alone = [bound(max_rows=max_rows, overlap=overlap, expert_ranks=1) for overlap in (False, True)]
    assert alone[0] == alone[1]


def test_it_needs_no_torch() -> None:
    code = "import sys, moetrain.moe.memory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
