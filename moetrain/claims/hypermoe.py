"""H1-H6: does a hyper-expert made from the unselected experts' embeddings help, and is it what is said to help?

HyperMoE, arXiv 2402.12656. What each control isolates stands in docs/concepts/claims.md.
"""

from __future__ import annotations

from typing import Any

from moetrain.claims.study import Arm, Claim, Comparison, Study
from moetrain.config.schema import RunConfig
from moetrain.config.size import parameter_count

# As wide, relative to the model, as the official settings are (r = 64, h = t = q = c = 128 at d = 768).
_HYPER = {"hidden": 32, "expert_embedding": 32, "process": 32, "condition": 32, "layer_embedding": 8}
_SWEEP = (4, 16, 64)


def hypermoe_study(base: RunConfig) -> Study:
    """The study at the sizes of `base`, a plain MoE model."""
    arms = {arm.name: arm for arm in (*_plain(base), *_hyper(base), *_ablations(base))}
    return Study("hypermoe", "HyperMoE", "arXiv 2402.12656", tuple(arms.values()), _CLAIMS)


def hyper_settings(base: RunConfig) -> dict[str, Any]:
    """`model.moe.hyper` of the study's HyperMoE."""
    return {**_HYPER, "bottleneck": bottleneck(base)}


def bottleneck(base: RunConfig) -> int:
    """r of every arm but those of the sweep: an eighth of the hidden size, in threes so that controls come out even."""
    return 3 * max(1, base.model.hidden_size // 16)


def _plain(base: RunConfig) -> list[Arm]:
    width = _moe(base).ffn_hidden_size
    # SwiGLU has three matrices of d x f where the hyper-expert has two of d x r: 6 d f = 4 d r.
    extra = 2 * bottleneck(base) // 3
    equal = _width_of_equal_parameters(base)
    return [
        _arm("moe-k1", "MoE, k = 1", 1),
        _arm("moe-k2", "MoE, k = 2", 2),
        _arm("wide-k1", f"MoE, k = 1, experts {extra} wider: the FLOPs of HyperMoE", 1, ffn=width + extra),
        _arm("wide-k2", f"MoE, k = 2, experts {extra // 2} wider: the FLOPs of HyperMoE", 2, ffn=width + extra // 2),
        _arm("heavy-k1", f"MoE, k = 1, experts of {equal}: the parameters of HyperMoE", 1, ffn=equal),
    ]


def _hyper(base: RunConfig) -> list[Arm]:
    r = bottleneck(base)
    return [
        _arm("hyper-k1", f"HyperMoE, k = 1, r = {r}", 1, hyper={"bottleneck": r}),
        _arm("hyper-k2", f"HyperMoE, k = 2, r = {r}", 2, hyper={"bottleneck": r}),
    ]


def _ablations(base: RunConfig) -> list[Arm]:
    r = bottleneck(base)
    changes: list[tuple[str, str, int, dict[str, Any]]] = [
        ("static-k1", "one plain bottleneck branch a layer, no hypernetwork", 1, {"condition_on": "static"}),
        ("selected-k1", "condition: the selected set", 1, {"condition_on": "selected"}),
        ("random-k1", "condition: fixed random embeddings", 1, {"condition_on": "random_fixed"}),
        ("constant-k1", "condition: a constant", 1, {"condition_on": "constant"}),
        ("no-layer-k1", "no layer embedding", 1, {"layer_embedding": 0}),
        ("per-layer-k1", "a hypernetwork for each layer", 1, {"sharing": "layer"}),
        ("gated-k2", "Ê times the selected probability", 2, {"coefficient": "selected_probability"}),
        ("sum-k2", "embeddings summed", 2, {"aggregation": "sum"}),
        ("prob-k2", "embeddings weighted by probability", 2, {"aggregation": "prob"}),
    ]
    changes += [(f"r{n}-k1", f"r = {n}", 1, {"bottleneck": n}) for n in _SWEEP]
    return [
        _arm(name, f"HyperMoE, k = {k}, {title}", k, hyper={"bottleneck": r, **change})
        for name, title, k, change in changes
    ]


def _arm(name: str, title: str, k: int, ffn: int | None = None, hyper: dict[str, Any] | None = None) -> Arm:
    settings: dict[str, Any] = {"model.moe.router.top_k": k}
    if ffn is not None:
        settings["model.moe.ffn_hidden_size"] = ffn
    if hyper is not None:
        settings["model.moe.hyper"] = {**_HYPER, **hyper}
    return Arm(name, title, settings)


def _width_of_equal_parameters(base: RunConfig) -> int:
    """The expert width at which a plain MoE has as many parameters as HyperMoE, to the nearest unit."""
    moe = _moe(base)
    hyper = hyper_settings(base)
    model = base.model.model_validate({**base.model.model_dump(), "moe": {**moe.model_dump(), "hyper": hyper}})
    missing = parameter_count(model).total - parameter_count(base.model).total
    per_unit = parameter_count(base.model).expert / moe.ffn_hidden_size
    return moe.ffn_hidden_size + round(missing / per_unit)


def _moe(base: RunConfig) -> Any:
    assert base.model.moe is not None
    return base.model.moe


_CLAIMS = (
    Claim(
        "H1",
        "HyperMoE has a lower loss than a MoE with the same experts and the same k.",
        (
            Comparison("hyper-k1", "moe-k1", "lower", "k = 1"),
            Comparison("hyper-k2", "moe-k2", "lower", "k = 2"),
        ),
    ),
    Claim(
        "H2",
        "It is not only capacity: HyperMoE also beats a MoE of equal FLOPs, and one of equal parameters.",
        (
            Comparison("hyper-k1", "wide-k1", "lower", "equal FLOPs, k = 1"),
            Comparison("hyper-k2", "wide-k2", "lower", "equal FLOPs, k = 2"),
            Comparison("hyper-k1", "heavy-k1", "lower", "equal parameters, k = 1"),
        ),
    ),
    Claim(
        "H3",
        "The hypernetwork matters: HyperMoE beats a plain bottleneck branch of the same width.",
        (Comparison("hyper-k1", "static-k1", "lower", "generated against static"),),
    ),
    Claim(
        "H4",
        "The knowledge of unselected experts matters: other conditions are worse. (The selected set must tie: it is an "
        "exact reparametrization.)",
        (
            Comparison("hyper-k1", "selected-k1", "tie", "the selected set instead"),
            Comparison("hyper-k1", "random-k1", "lower", "fixed random embeddings instead"),
            Comparison("hyper-k1", "constant-k1", "lower", "no condition but the layer"),
            Comparison("hyper-k1", "no-layer-k1", "none", "without layer embeddings"),
            Comparison("hyper-k1", "per-layer-k1", "none", "one hypernetwork for all layers against one each"),
        ),
    ),
    Claim(
        "H5",
        "Which coefficient, aggregation and width are best?",
        (
            Comparison("gated-k2", "hyper-k2", "none", "gated by the selected probability, against a coefficient of 1"),
            Comparison("sum-k2", "hyper-k2", "none", "sum against mean"),
            Comparison("prob-k2", "hyper-k2", "none", "weighted by probability against mean"),
            *(Comparison(f"r{n}-k1", "moe-k1", "none", f"r = {n} against none") for n in _SWEEP),
        ),
    ),
)
