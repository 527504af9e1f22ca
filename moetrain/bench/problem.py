"""What a benchmark is made of: something of ours, and named others that should give the same."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


class NotHereError(Exception):
    """Raised by whatever builds a contender that cannot run here; the message is the reason that tables show."""


def _as_output(value: Any) -> dict[str, Tensor]:
    return {"y": value}


@dataclass(frozen=True)
class Contender:
    """`call` is what is timed; `result` names the tensors of what it returned, outside the time.

    Contenders are compared by the names that they share. Rows (the last axis) are what is compared, so `result` brings
    another layout into ours.
    """

    call: Callable[[], Any]
    result: Callable[[Any], Mapping[str, Tensor]] = _as_output


@dataclass(frozen=True)
class Missing:
    """A baseline that cannot run here, and why."""

    reason: str


@dataclass(frozen=True)
class Problem:
    """`work` of one call of ours in `unit`: "FLOP" or "B" (bytes read and written at least once)."""

    ours: Contender
    baselines: Mapping[str, Contender | Missing]
    work: float
    unit: str = "FLOP"


def attempt(build: Callable[..., Contender], *args: Any) -> Contender | Missing:
    """`build(*args)`, or the reason that it gave."""
    try:
        return build(*args)
    except NotHereError as error:
        return Missing(str(error))


def load(name: str) -> Callable[..., Any]:
    """The function behind "module:function". NotHereError when it needs a package that is not installed."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "moetrain":
            raise  # a broken installation of our own
        raise NotHereError(f"the package {error.name} is not installed") from error
