"""The shapes on which compiled code is held to :mod:`moetrain.ops.reference`, on the CPU and on the GPU.

Legend: T tokens, K slots a token, E experts, N out.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTHS = (1, 7, 33, 100, 520)
"""Hidden sizes: around the vectors of every instruction set and the chunk of the accumulators."""

DTYPES = (torch.float32, torch.bfloat16)


def _random_ids(tokens: int, slots: int, experts: int) -> Tensor:
    """Each slot is unused with the same probability as any one expert."""
    generator = torch.Generator().manual_seed(tokens + 7 * slots + 31 * experts)
    return torch.randint(-1, experts, (tokens, slots), generator=generator)


def routings() -> dict[str, tuple[Tensor, int]]:
    """Name -> expert ids ``[T, K]`` (-1: unused slot) and the number of experts."""
    few_unused = _random_ids(200, 3, 16)
    return {
        "no_tokens": (torch.empty(0, 2, dtype=torch.int64), 4),
        "no_slots": (torch.empty(3, 0, dtype=torch.int64), 4),
        "every_slot_unused": (torch.full((5, 2), -1), 3),
        "one_expert_takes_all": (torch.full((9, 2), 2), 4),
        "one_expert_only": (torch.zeros(6, 1, dtype=torch.int64), 1),
        "empty_expert": (torch.tensor([[0, 3], [3, 1], [1, 0], [0, 1]]), 4),
        "one_slot_a_token": (_random_ids(40, 1, 5).clamp(min=0), 5),
        "tokens_without_experts": (torch.tensor([[-1, -1, -1], [2, -1, 0], [-1, 1, -1], [1, 2, 0]]), 3),
        "many": (few_unused, 16),
    }


GEMMS: dict[str, tuple[tuple[int, ...], int, int]] = {
    "no_rows": ((0, 0), 8, 8),
    "one_row": ((1,), 5, 3),
    "one_by_one": ((3, 0, 2), 1, 1),
    "empty_experts": ((0, 5, 0, 13, 0), 33, 40),
    "all_in_the_last": ((0, 0, 50), 64, 32),
    "tails": ((11, 12, 13, 25), 100, 33),
    "long_reduction": ((7, 30), 530, 70),
    "wide_output": ((4, 9), 20, 600),
    "many_rows": ((600, 3), 24, 28),
}
"""Name -> rows of each expert, K in, N out: around the tiles, the blocks and their tails."""
