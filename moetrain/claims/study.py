"""What a study is made of. No torch: a study is data."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Expectation = Literal["lower", "tie", "none"]
"""What is claimed of arm minus baseline in held-out loss; "none" where nothing is claimed and we want to know."""

Baselines = Mapping[str, "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """What an arm measured, averaged over its seeds: what a later arm's settings may depend on."""

    loss: float
    mean_k: float


@dataclass(frozen=True)
class Arm:
    """One model of a study.

    Attributes:
        name: folder-safe and unique in its study.
        title: what stands in the report's tables.
        settings: dotted settings over the preset, JSON values; a section with a `type` replaces the section.
        after, derive: an arm that is made equal in something to what another arm turned out to be: that arm's name,
            and further settings from its outcome.
    """

    name: str
    title: str
    settings: Mapping[str, Any]
    after: str | None = None
    derive: Callable[[Outcome], Mapping[str, Any]] | None = None

    def overrides(self, outcomes: Baselines) -> list[str]:
        """The settings as command-line overrides."""
        settings = dict(self.settings)
        if self.after is not None:
            assert self.derive is not None
            settings |= self.derive(outcomes[self.after])
        return [f"{path}={json.dumps(value)}" for path, value in settings.items()]


@dataclass(frozen=True)
class Comparison:
    """Arm minus baseline, seed by seed."""

    arm: str
    baseline: str
    expects: Expectation
    why: str


@dataclass(frozen=True)
class Claim:
    """A question of the study.

    Attributes:
        name: "H1".
        statement: what is claimed, or asked, in one sentence.
        comparisons: what must hold for the claim. The verdict is that of the worst of them.
    """

    name: str
    statement: str
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True)
class Study:
    """All of a paper's claims."""

    name: str
    title: str
    paper: str
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...]

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        assert len(set(names)) == len(names), "arm names must be unique"
        wanted = {n for claim in self.claims for c in claim.comparisons for n in (c.arm, c.baseline)}
        wanted |= {arm.after for arm in self.arms if arm.after is not None}
        assert wanted <= set(names), f"unknown arms: {wanted - set(names)}"

    def arm(self, name: str) -> Arm:
        """The arm of this name."""
        return next(arm for arm in self.arms if arm.name == name)
