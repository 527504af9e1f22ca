"""What every router promises, as experiments on random tokens. `moetrain.testing.check_router` runs them all.

Legend: S sequence positions, B sequences, T = S * B tokens, D hidden size, E experts, K the most experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from moetrain.config.moe import MoEConfig
from moetrain.config.routers import TopKRouterConfig
from moetrain.config.routing import RouterConfig
from moetrain.moe.routing import Router, RoutingContext, RoutingDecision, build_router
from moetrain.moe.telemetry import RouterCounts
from moetrain.ops import plan_permutation

_LENGTH, _SEQUENCES = 12, 3


def check_promises(settings: RouterConfig, num_experts: int, hidden_size: int, seed: int) -> None:
    """See `moetrain.testing.check_router`."""
    _settings_are_in_order(settings, num_experts)
    for training in (True, False):
        for promise in _PROMISES:
            promise(_Trial(settings, num_experts, hidden_size, seed, training))


@dataclass(frozen=True)
class _Tokens:
    """A batch for a router."""

    x_TD: Tensor
    context: RoutingContext

    def rows(self, keep_SB: Tensor, start: int = 0, length: int | None = None) -> _Tokens:
        """The tokens of these numbers, int64 [S', B'], with everything that the context says of them. `start` and
        `length` as in `RoutingContext`; the length is S' unless more ranks share the sequence."""
        keep_T = keep_SB.flatten()
        tensors = {
            field.name: value[keep_T]
            for field in fields(self.context)
            if isinstance(value := getattr(self.context, field.name), Tensor)
        }
        local_length, sequences = keep_SB.shape
        return _Tokens(
            self.x_TD[keep_T],
            replace(
                self.context,
                local_length=local_length,
                sequences=sequences,
                length=local_length if length is None else length,
                start=start,
                **tensors,
            ),
        )


class _Trial:
    """A router with random weights, and tokens to route."""

    def __init__(self, settings: RouterConfig, num_experts: int, hidden_size: int, seed: int, training: bool) -> None:
        self.settings, self.num_experts, self.hidden_size = settings, num_experts, hidden_size
        self._random = torch.Generator().manual_seed(seed)
        self.router = self.build(torch.float32).train(training)
        self.number_SB = torch.arange(_LENGTH * _SEQUENCES).view(_LENGTH, _SEQUENCES)
        self.tokens = self.draw_tokens()

    def build(self, dtype: torch.dtype) -> Router:
        """With logits of standard deviation one for tokens of unit mean square."""
        # By a copy, because only an installed package's settings are legal in a config.
        legal = MoEConfig(num_experts=self.num_experts, ffn_hidden_size=1, router=TopKRouterConfig(top_k=1))
        router = build_router(legal.model_copy(update={"router": self.settings}), self.hidden_size, dtype, layer=0)
        with torch.no_grad():
            for parameter in router.parameters():
                drawn = torch.randn(parameter.shape, generator=self._random)
                parameter.copy_(drawn / parameter.shape[-1] ** 0.5 if parameter.dim() else drawn)
        return router

    def draw_tokens(self) -> _Tokens:
        """Random ones, with whatever the settings ask for."""
        tokens = _LENGTH * _SEQUENCES
        x_TD = torch.randn(tokens, self.hidden_size, generator=self._random)
        asks = self.settings.attention_measure or self.settings.attention_teacher
        importance_T = torch.rand(tokens, generator=self._random) if asks else None
        return _Tokens(x_TD, RoutingContext(_LENGTH, _SEQUENCES, _LENGTH, 0, importance_T))

    def route(self, tokens: _Tokens) -> RoutingDecision:
        return self.router(tokens.x_TD, tokens.context)

    def state(self) -> dict[str, Tensor]:
        """Controllers and whatever else the router keeps, copied."""
        kept = {**dict(self.router.controllers()), **self.router.state_dict()}
        return {name: value.detach().clone() for name, value in kept.items()}

    def same_as_whole(self, part: _Tokens, keep_SB: Tensor, promise: str) -> None:
        """The part's tokens get, to the bit, what they get in the whole batch."""
        whole, mine, keep_T = self.route(self.tokens), self.route(part), keep_SB.flatten()
        for name in ("expert_ids_TK", "weights_TK", "num_selected_T"):
            assert torch.equal(getattr(mine, name), getattr(whole, name)[keep_T]), f"{promise}: {name} changes"


# --- the settings ----------------------------------------------------------------------------------------------------


def _settings_are_in_order(settings: RouterConfig, num_experts: int) -> None:
    found = settings.problems(num_experts)
    assert not found, f"the settings do not fit {num_experts} experts: {'; '.join(found)}"
    kind = type(settings)
    assert kind.model_fields["type"].default == settings.type, "`type` must have its one legal value as default"
    assert kind.model_validate(settings.model_dump()) == settings, "settings must survive being written and read"
    selectable = settings.selectable(num_experts)
    assert len(selectable) and 1 <= selectable[0] <= selectable[-1] <= num_experts, (
        f"selectable must lie within 1 and num_experts ({num_experts}); it is {selectable}"
    )
    mean = settings.expected_mean_k(num_experts)
    assert selectable[0] <= mean <= selectable[-1], f"expected_mean_k ({mean}) must lie within {selectable}"
    assert settings.describe(num_experts), "describe must say how many experts a token gets and what decides it"
    for fewer in range(1, num_experts):
        if settings.selectable(fewer)[-1] > fewer:
            assert settings.problems(fewer), f"problems must refuse {fewer} experts, fewer than a token may get"


# --- one decision ----------------------------------------------------------------------------------------------------


def _decision_is_well_formed(trial: _Trial) -> None:
    _well_formed(trial, trial.route(trial.tokens), _LENGTH * _SEQUENCES)


def _no_token_is_a_legal_batch(trial: _Trial) -> None:
    _well_formed(trial, trial.route(trial.tokens.rows(trial.number_SB[:0], length=_LENGTH)), 0)


def _extreme_scores_do_no_harm(trial: _Trial) -> None:
    for scale in (0.0, 1e4, -1e4):
        _well_formed(trial, trial.route(replace(trial.tokens, x_TD=trial.tokens.x_TD * scale)), _LENGTH * _SEQUENCES)


def _decides_in_fp32_whatever_the_dtype(trial: _Trial) -> None:
    router = trial.build(torch.bfloat16)
    decision = router(trial.tokens.x_TD.bfloat16(), trial.tokens.context)
    _well_formed(trial, decision, _LENGTH * _SEQUENCES)
    assert all(value.dtype == torch.float32 for _, value in router.controllers()), "controllers must be fp32"


def _well_formed(trial: _Trial, decision: RoutingDecision, tokens: int) -> None:
    settings, num_experts = trial.settings, trial.num_experts
    selectable = settings.selectable(num_experts)
    ids_TK, weights_TK, num_selected_T = decision.expert_ids_TK, decision.weights_TK, decision.num_selected_T
    for name, value, shape, dtype in (
        ("expert_ids_TK", ids_TK, (tokens, selectable[-1]), torch.int64),
        ("weights_TK", weights_TK, (tokens, selectable[-1]), torch.float32),
        ("num_selected_T", num_selected_T, (tokens,), torch.int64),
        ("probs_TE", decision.probs_TE, (tokens, num_experts), torch.float32),
        ("logits_TE", decision.logits_TE, (tokens, num_experts), torch.float32),
    ):
        assert tuple(value.shape) == shape, f"{name} must have shape {shape}; it has {tuple(value.shape)}"
        assert value.dtype == dtype, f"{name} must be {dtype}; it is {value.dtype}"
        assert bool(value.isfinite().all()), f"{name} must be finite"
    used_TK = torch.arange(selectable[-1]) < num_selected_T[:, None]
    assert all(k in selectable for k in num_selected_T.tolist()), f"K of a token must be in {selectable}"
    assert bool(((ids_TK >= 0) == used_TK).all()), "the first K slots of a token are used, the others hold -1"
    assert bool(((ids_TK >= -1) & (ids_TK < num_experts)).all()), f"expert ids must be below {num_experts}"
    assert not bool(weights_TK[~used_TK].any()), "an unused slot must have weight 0"
    for ids, used in zip(ids_TK.tolist(), used_TK.sum(dim=1).tolist(), strict=True):
        assert len(set(ids[:used])) == used, f"a token got an expert twice: {ids}"
    if tokens:
        torch.testing.assert_close(
            decision.probs_TE.sum(dim=-1), torch.ones(tokens), msg="rows of probs_TE must sum to one"
        )
    assert not bool((decision.probs_TE < 0).any()), "probs_TE must not be negative"
    counted = plan_permutation(ids_TK, num_experts).tokens_per_expert_E
    recount = torch.bincount(ids_TK[used_TK], minlength=num_experts)
    assert torch.equal(counted, recount), "the dispatch must see the experts that num_selected_T counts"
    _extras_are_well_formed(trial, decision)


def _extras_are_well_formed(trial: _Trial, decision: RoutingDecision) -> None:
    wanted = trial.settings.num_statistics
    found = 0 if decision.statistics is None else len(decision.statistics)
    # Nobody asks for them in evaluation.
    if trial.router.training or decision.statistics is not None:
        assert found == wanted, f"num_statistics says {wanted}, the router counts {found}"
    if decision.statistics is not None:
        assert decision.statistics.dtype == torch.float64, "statistics must be float64, which counts exactly"
    if decision.loss is not None:
        assert decision.loss.dim() == 0 and bool(decision.loss.isfinite()), "loss must be a finite scalar"
    if (penalty := decision.load_penalty) is not None:
        assert penalty.values_TE.shape == decision.probs_TE.shape, "a load penalty has a value per token and expert"
        assert not penalty.coefficient.requires_grad, "the coefficient of a load penalty has no gradient"
        assert bool((penalty.coefficient * penalty.values_TE).isfinite().all()), "a load penalty must be finite"


# --- what a decision may depend on -----------------------------------------------------------------------------------


def _the_same_again(trial: _Trial) -> None:
    trial.same_as_whole(trial.tokens, trial.number_SB, "the same tokens must get the same")


def _neighbors_do_not_matter(trial: _Trial) -> None:
    whole = trial.number_SB
    for sequences in ([2, 0, 1], [1], [0, 2]):
        keep_SB = whole[:, sequences]
        trial.same_as_whole(
            trial.tokens.rows(keep_SB), keep_SB, f"other sequences ({sequences} of 3) must not change a token's bits"
        )


def _the_split_of_a_sequence_does_not_matter(trial: _Trial) -> None:
    whole = trial.route(trial.tokens)
    parts = []
    for start, end in ((0, 5), (5, _LENGTH)):
        keep_SB = trial.number_SB[start:end]
        part = trial.tokens.rows(keep_SB, start, _LENGTH)
        trial.same_as_whole(part, keep_SB, f"tensor ranks that share a sequence (positions {start} to {end - 1})")
        parts.append(trial.route(part))
    if whole.loss is not None:
        total = sum(part.loss for part in parts if part.loss is not None)
        torch.testing.assert_close(total, whole.loss, msg="the parts of a loss must sum to it (use context.mean_part)")
    if whole.statistics is not None:
        total = sum(part.statistics for part in parts if part.statistics is not None)
        assert isinstance(total, Tensor) and torch.equal(total, whole.statistics), "statistics must be sums of integers"


def _the_future_does_not_matter(trial: _Trial) -> None:
    other = trial.draw_tokens()
    for known in (1, 2, 7):
        keep_SB = trial.number_SB[:known]
        promise = f"what follows the first {known} positions must not change their bits"
        trial.same_as_whole(trial.tokens.rows(keep_SB), keep_SB, promise)
        mixed = _with_tail(trial.tokens, other, known * _SEQUENCES)
        mine, whole = trial.route(mixed), trial.route(trial.tokens)
        for name in ("expert_ids_TK", "weights_TK", "num_selected_T"):
            past, same = getattr(mine, name)[keep_SB.flatten()], getattr(whole, name)[keep_SB.flatten()]
            assert torch.equal(past, same), f"{promise}: {name} changes"


def _with_tail(tokens: _Tokens, other: _Tokens, known: int) -> _Tokens:
    """The first `known` tokens, and those of another batch after them."""
    tensors = {}
    for field in fields(tokens.context):
        value = getattr(tokens.context, field.name)
        if isinstance(value, Tensor):
            tensors[field.name] = torch.cat([value[:known], getattr(other.context, field.name)[known:]])
    return _Tokens(torch.cat([tokens.x_TD[:known], other.x_TD[known:]]), replace(tokens.context, **tensors))


def _hidden_experts_come_last(trial: _Trial) -> None:
    """Where the settings promise it; each token here may see every other expert."""
    if not trial.settings.respects_token_mask:
        return
    tokens = torch.arange(_LENGTH * _SEQUENCES)
    hidden_TE = (torch.arange(trial.num_experts) - tokens[:, None]) % trial.num_experts % 2 == 1
    context = replace(trial.tokens.context, hidden_TE=hidden_TE)
    decision = trial.route(replace(trial.tokens, context=context))
    ids_TK, weights_TK = decision.expert_ids_TK, decision.weights_TK
    hidden_TK = hidden_TE.gather(1, ids_TK.clamp(min=0)) & (ids_TK >= 0)
    assert not bool(weights_TK[hidden_TK].any()), "an expert that is hidden from the token must have weight 0"
    later_TK = hidden_TK.cumsum(dim=1) > 0
    assert not bool((later_TK & ~hidden_TK & (ids_TK >= 0)).any()), "an expert hidden from the token must come last"
    finite = [weights_TK, decision.probs_TE, *(() if decision.loss is None else (decision.loss,))]
    torch.stack([value.sum() for value in finite]).sum().backward()
    gradient = trial.router.weight.grad
    assert gradient is not None
    assert all(bool(v.isfinite().all()) for v in (*finite, gradient)), "a hidden expert's score must make no NaN"


# --- learning --------------------------------------------------------------------------------------------------------


def _the_task_teaches_the_gate(trial: _Trial) -> None:
    x_TD = trial.tokens.x_TD.clone().requires_grad_()
    weights_TK = trial.route(replace(trial.tokens, x_TD=x_TD)).weights_TK
    assert weights_TK.requires_grad, "no gradient reaches the gate's weight through weights_TK"
    # As if every expert's output had another use for the loss.
    (weights_TK * torch.arange(1.0, 1 + weights_TK.numel()).view_as(weights_TK).sin()).sum().backward()
    for name, gradient in (("the gate's weight", trial.router.weight.grad), ("the tokens", x_TD.grad)):
        assert gradient is not None, f"no gradient reaches {name} through weights_TK"
        assert bool(gradient.isfinite().all()), f"the gradient of {name} must be finite"
        assert gradient.abs().max() > 1e-6, f"the gradient of {name} through weights_TK is zero"


def _controllers_move_in_update_alone(trial: _Trial) -> None:
    before = trial.state()
    scalars = {name for name, value in trial.router.controllers() if value.dim() == 0}
    unknown = set(trial.settings.reported) - scalars
    assert not unknown, f"reported names what is no scalar controller: {', '.join(sorted(unknown))}"
    trial.route(trial.draw_tokens())
    after = trial.state()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert not moved, f"a forward pass must not change {', '.join(moved)}"


def _update_knows_the_counts_alone(trial: _Trial) -> None:
    twin = deepcopy(trial.router)
    for counts in _some_counts(trial):
        trial.route(trial.draw_tokens())  # what this rank saw must not matter: the others saw something else
        trial.router.update(counts)
        twin.update(counts)
    mine, theirs = dict(trial.router.controllers()), dict(twin.controllers())
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), f"update must depend on the counts alone; controller {name} does not"
        assert value.dtype == torch.float32 and bool(value.isfinite().all()), f"controller {name} must be finite, fp32"
    pairs = zip(trial.router.parameters(), twin.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs), "update must leave parameters alone"
    _well_formed(trial, trial.route(trial.tokens), _LENGTH * _SEQUENCES)


def _some_counts(trial: _Trial) -> Iterator[RouterCounts]:
    """Of the trial's own tokens, of a batch that one expert got whole, and of an empty one."""
    decision = trial.route(trial.tokens)
    loads = plan_permutation(decision.expert_ids_TK, trial.num_experts).tokens_per_expert_E
    most = trial.settings.selectable(trial.num_experts)[-1]
    histogram = torch.bincount(decision.num_selected_T, minlength=most + 1)
    nothing = [0.0] * trial.settings.num_statistics
    statistics = nothing if decision.statistics is None else decision.statistics.tolist()
    yield RouterCounts(loads.tolist(), histogram.tolist(), 1.0, 0.0, statistics, None)
    one = [100] + [0] * (trial.num_experts - 1)
    yield RouterCounts(one, [0, 100] + [0] * (most - 1), 1.0, 0.0, statistics, None)
    yield RouterCounts([0] * trial.num_experts, [0] * (most + 1), 0.0, 0.0, nothing, None)


_PROMISES: tuple[Callable[[_Trial], None], ...] = (
    _decision_is_well_formed,
    _no_token_is_a_legal_batch,
    _extreme_scores_do_no_harm,
    _decides_in_fp32_whatever_the_dtype,
    _the_same_again,
    _neighbors_do_not_matter,
    _the_split_of_a_sequence_does_not_matter,
    _the_future_does_not_matter,
    _hidden_experts_come_last,
    _the_task_teaches_the_gate,
    _controllers_move_in_update_alone,
    _update_knows_the_counts_alone,
)
