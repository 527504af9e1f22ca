"""Whether two contenders compute the same. A speed of something else would be worth nothing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moetrain.errors import MoetrainError

# Relative error of the worst row. bfloat16 keeps 8 bits, and contenders round at different places; one wrong element
# among 512 would be 0.04 to 0.06. By the dtype of the operands: what was made of bfloat16 is no better than that.
TOLERANCES = {"bf16": 3e-2, "fp32": 2e-4, "int64": 0.0}
_CHUNK_ELEMENTS = 2**24  # compared in pieces: float32 copies of all weight gradients would not fit beside them


class DisagreementError(MoetrainError):
    """A baseline's result is not ours."""


def check_agreement(
    case: str, baseline: str, dtype: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> None:
    """Raises `DisagreementError` unless all tensors that both name are equal within the tolerance of `dtype`."""
    shared = [name for name in ours if name in theirs]
    assert shared, f"{case}: {baseline} has nothing to compare: {list(ours)} and {list(theirs)}"
    for name in shared:
        problem = _difference(ours[name].detach(), theirs[name].detach(), TOLERANCES[dtype])
        if problem:
            raise DisagreementError(f"{case}: {name} of {baseline} is not ours: {problem}; nothing is timed")


def _difference(ours: Tensor, theirs: Tensor, tolerance: float) -> str | None:
    if ours.shape != theirs.shape:
        return f"shapes {tuple(ours.shape)} (ours) and {tuple(theirs.shape)}"
    if not ours.dtype.is_floating_point:
        return None if torch.equal(ours, theirs) else "integers differ"
    error = row_error(ours, theirs)
    return None if error <= tolerance else f"largest row error {error:.2g}, at most {tolerance:g} is legal"


def row_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest relative error of a row: the norm of its difference over its own norm, or over the root mean square
    of all rows where that is larger (a row that nearly cancels has no relative error to speak of). NaN: infinite."""
    width = max(ours.shape[-1], 1) if ours.dim() else 1
    rows = max(_CHUNK_ELEMENTS // width, 1)
    pieces = [
        ((a.float() - b.float()).square().sum(dim=1), b.float().square().sum(dim=1))
        for a, b in zip(ours.reshape(-1, width).split(rows), theirs.reshape(-1, width).split(rows), strict=True)
    ]
    squares, sizes = (torch.cat(column) for column in zip(*pieces, strict=True))
    if not squares.any():  # equal, be it all zeros; NaN counts as true
        return 0.0
    return (squares / sizes.clamp(min=sizes.mean())).nan_to_num(nan=torch.inf, posinf=torch.inf).max().sqrt().item()
