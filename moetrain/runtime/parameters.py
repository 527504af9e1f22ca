"""What a parameter of this rank is in the whole model. Made by `model`, read by `optim`, `checkpoint`'s bridge and
`train`: none of them needs to know Megatron's marks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

Tie = Literal["no", "embedding"] | tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """A run of rows of a local parameter that is one rectangle of the global tensor.

    `rows` counts along dimension 0 of the local parameter; `offset` is the rectangle's corner in the global tensor.
    The rectangle's other extents are the local parameter's.
    """

    rows: int
    offset: tuple[int, ...]


@dataclass(frozen=True)
class ParameterInfo:
    """One parameter of this rank.

    Attributes:
        name: global name; the same on every layout.
        parameter: the local tensor. Under ZeRO-3 it is empty between its uses; `local_shape` stays.
        local_shape: its shape on this rank.
        global_shape: shape of the whole tensor.
        blocks: how the local rows lie in the global tensor, in local order.
        expert: reduced over the expert-data-parallel ranks rather than the data-parallel ones.
        counted: whether this rank's copy is the one that counts in the gradient norm and is stored, as far as tensor
            and pipeline replicas go (data-parallel replicas are ZeRO's business).
        sum_over_tensor: the gradient here is a partial sum over the tensor ranks.
        tied: the copies on other pipeline stages whose gradients must be added: none, on the first and last (the
            embedding), or on the stages listed, in ascending order. The first of them counts.
        decay: whether weight decay applies.
    """

    name: str
    parameter: nn.Parameter
    local_shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    expert: bool
    counted: bool
    sum_over_tensor: bool
    tied: Tie
    decay: bool
