"""The report of a study: Markdown, with its pictures beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moetrain.claims import plots
from moetrain.claims.counts import Counts, mean_counts
from moetrain.claims.findings import Compared, Finding, summarize
from moetrain.claims.intervals import CONFIDENCE, NOISE
from moetrain.claims.lab import Results
from moetrain.claims.leak import Leak
from moetrain.claims.material import Material
from moetrain.claims.study import Study
from moetrain.claims.throughput import Ratio
from moetrain.config.schema import RunConfig
from moetrain.errors import ConfigError


@dataclass(frozen=True)
class Facts:
    """All that a report tells besides the results.

    Attributes:
        command, machine: how and on what it was made.
        throughput: of HyperMoE, by size and then by form; `leak`, `counts`: of DA-MoE, by arm, a value for each seed.
    """

    study: Study
    preset: str
    base: RunConfig
    seeds: Sequence[int]
    material: Material
    command: str
    machine: str
    throughput: Mapping[str, Mapping[str, Ratio]]
    leak: Mapping[str, Sequence[Leak]]
    counts: Mapping[str, Sequence[Counts]]


def check_target(page: Path) -> None:
    """Refuse a page that would overwrite what no report is. Raises ConfigError."""
    if page.suffix != ".md":
        raise ConfigError(f"--write ({page}) must name a .md file")
    if page.exists() and not page.read_text(encoding="utf-8", errors="replace").startswith(_MARK):
        raise ConfigError(f"--write ({page}) is there and no report of claims; nothing was touched")


_MARK = "<!-- made by moetrain claims; do not edit -->\n"


def write(page: Path, facts: Facts, findings: Sequence[Finding], results: Results) -> None:
    """The page, its pictures in the folder of its name."""
    pictures = page.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    plots.forest(findings, pictures / "differences.svg")
    plots.losses(facts.study, results, pictures / "losses.svg")
    compared = [c.comparison for c in findings[0].compared]
    first = list(dict.fromkeys(name for c in compared for name in (c.baseline, c.arm)))
    plots.curves(facts.study, results, first, pictures / "curves.svg")
    if facts.counts:
        plots.counts({arm: mean_counts(runs) for arm, runs in facts.counts.items()}, pictures / "counts.svg")
    draft = page.with_name(f".{page.name}.partial")
    draft.write_text(_MARK + "\n".join(_lines(facts, findings, results, pictures.name)) + "\n", encoding="utf-8")
    draft.replace(page)


def _lines(facts: Facts, findings: Sequence[Finding], results: Results, pictures: str) -> list[str]:
    study, model, training = facts.study, facts.base.model, facts.base.training
    assert model.moe is not None
    tokens = training.train_iters * training.global_batch_size * model.seq_length
    return [
        f"# {study.title}: the claims, tested",
        "",
        f"Of {study.paper}. {len(study.arms)} arms, {len(facts.seeds)} paired seeds, `{facts.preset}` preset: "
        f"{model.num_layers} layers of {model.hidden_size}, {model.moe.num_experts} experts of "
        f"{model.moe.ffn_hidden_size}, vocabulary {model.vocab_size}, sequences of {model.seq_length}; "
        f"{training.train_iters:,} steps, {tokens:,} tokens a run. Corpus: {facts.material.source}, "
        f"{facts.material.train_tokens:,} tokens to train on, {facts.material.valid_tokens:,} held out. "
        "[What each arm and control is for](../concepts/claims.md).",
        "",
        "Losses are of held-out text at the end of training, nats per token. A difference is the mean over seeds of "
        f"arm minus baseline, with its {CONFIDENCE:.0%} interval (Student's t). It counts where the interval leaves "
        f"zero out and the mean is at least {NOISE} nats. So small models on so few tokens say whether a mechanism "
        "works, not what it is worth at scale.",
        "",
        "## Verdicts",
        "",
        *_verdicts(findings),
        "",
        f"![differences]({pictures}/differences.svg)",
        "",
        "## Differences",
        "",
        *(line for finding in findings for line in _finding(finding)),
        *_throughput(facts.throughput),
        *_leak(facts.leak),
        *_counts({arm: mean_counts(runs) for arm, runs in facts.counts.items()}, pictures),
        "## Arms",
        "",
        *_arms(study, results),
        "",
        f"![losses]({pictures}/losses.svg)",
        "",
        f"![curves]({pictures}/curves.svg)",
        "",
        "## How this was made",
        "",
        f"`{facts.command}`, on {facts.machine}.",
    ]


def _verdicts(findings: Sequence[Finding]) -> list[str]:
    rows = [f"| {f.claim.name} | {f.claim.statement} | **{f.verdict}** |" for f in findings]
    return ["| | claim | verdict |", "| --- | --- | --- |", *rows]


def _finding(finding: Finding) -> list[str]:
    return [
        f"### {finding.claim.name}: {finding.verdict}",
        "",
        finding.claim.statement,
        "",
        "| comparison | arm - baseline | difference | interval | expected | verdict |",
        "| --- | --- | --- | --- | --- | --- |",
        *(_row(compared) for compared in finding.compared),
        "",
    ]


def _row(compared: Compared) -> str:
    c, d = compared.comparison, compared.difference
    expected = {"lower": "below 0", "tie": "0", "none": "-"}[c.expects]
    cells = (
        c.why,
        f"{c.arm} - {c.baseline}",
        f"{d.mean:+.4f}",
        f"{d.low:+.4f} to {d.high:+.4f}",
        expected,
        compared.verdict,
    )
    return f"| {' | '.join(cells)} |"


def _throughput(by_size: Mapping[str, Mapping[str, Ratio]]) -> list[str]:
    if not by_size:
        return []
    rows = [
        f"| {size} | {name} | {ratio.median:.2f} | {ratio.low:.2f} to {ratio.high:.2f} |"
        for size, ratios in by_size.items()
        for name, ratio in ratios.items()
    ]
    return [
        "## H6: what a step costs",
        "",
        "Time of a training step over that of the plain MoE of the same size, steps alternating in one process: median "
        "and quartiles. The paper says about 1.15 (section 1).",
        "",
        "| model | form of the hyper-expert | times the plain MoE | quartiles |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
    ]


def _leak(by_arm: Mapping[str, Sequence[Leak]]) -> list[str]:
    if not by_arm:
        return []
    rows = [
        f"| {arm} | {_mean([x.training for x in leaks]):.4f} | {_mean([x.decoding for x in leaks]):.4f} | "
        f"{_mean([x.gap for x in leaks]):+.4f} |"
        for arm, leaks in by_arm.items()
    ]
    return [
        "## D5: what training sees and what decoding gets",
        "",
        "The same held-out tokens, predicted from whole sequences as in training, and one by one from the tokens so "
        "far, as in decoding.",
        "",
        "| arm | as in training | as in decoding | gap |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
    ]


def _counts(by_arm: Mapping[str, Counts], pictures: str) -> list[str]:
    if not by_arm:
        return []
    rows = [
        f"| {arm} | {_by_position(c)} | {_or_dash(c.with_own_loss)} | {_or_dash(c.with_next_loss)} | {_by_k(c)} |"
        for arm, c in by_arm.items()
    ]
    return [
        "## Which tokens get many experts",
        "",
        "Over held-out text, all layers, mean over seeds. Rank correlations (Spearman) of K with the loss of the token "
        "itself and with that of the prediction made at it; and for each K the share of tokens and that prediction's "
        "mean loss.",
        "",
        "| arm | mean K at positions 0, 1, 2-3, 4-7, ... | K and own loss | K and next loss | K: share, next loss |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        "",
        f"![K by position, and the loss where K experts were given]({pictures}/counts.svg)",
        "",
    ]


def _by_position(counts: Counts) -> str:
    return " ".join(f"{mean_k:.1f}" for mean_k in counts.by_position.values())


def _by_k(counts: Counts) -> str:
    return "; ".join(f"{k}: {share:.0%}, {loss:.2f}" for k, (share, loss) in counts.by_k.items())


def _or_dash(correlation: float | None) -> str:
    return "-" if correlation is None else f"{correlation:+.2f}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _arms(study: Study, results: Results) -> list[str]:
    rows = []
    for arm in study.arms:
        s = summarize(results[arm.name])
        rows.append(
            f"| {arm.name} | {arm.title} | {s.loss:.4f} | {s.spread:.4f} | {s.parameters:,} | {s.flops / 1e6:.2f} | "
            f"{s.mean_k:.3f} | {1000 * s.step_seconds:.0f} |"
        )
    return [
        "Milliseconds are those of the trainings themselves, which ran beside one another and beside other work at "
        "different times: they tell what the study took, not what an arm costs. Costs are the floating-point "
        "operations.",
        "",
        "| arm | what it is | loss | deviation over seeds | parameters | MFLOP a token | mean K | ms a step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *rows,
    ]
