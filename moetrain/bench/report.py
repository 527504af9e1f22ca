"""Tables of what was measured: once as rows of text, for a terminal or for Markdown. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from moetrain.bench.catalog import BENCHMARKS
from moetrain.bench.results import CaseResult, Machine, Spread
from moetrain.bench.runner import Report
from moetrain.errors import ConfigError

MARK = "<!-- written by `moetrain bench ops`; do not edit -->"
_PREFIX = {1e12: "T", 1e9: "G", 1e6: "M"}


@dataclass(frozen=True)
class Row:
    """One measured point as text. `ratios`: by baseline."""

    case: str
    threads: str
    milliseconds: str
    rate: str
    of_peak: str
    ratios: dict[str, str]


@dataclass(frozen=True)
class Section:
    """One benchmark as text. `relation`: what the ratios are, "against" or "cost over" a baseline."""

    name: str
    title: str
    sizes: str
    relation: str
    rows: list[Row]
    notes: list[str]

    def baselines(self) -> list[str]:
        """In the order in which they are listed; one that ran nowhere is not among them."""
        return list(dict.fromkeys(who for row in self.rows for who in row.ratios))


def sections(report: Report) -> list[Section]:
    """One for each benchmark that was asked for, in the catalog's order."""
    assert report.machine is not None
    order = {name: number for number, name in enumerate(BENCHMARKS)}
    cases = sorted(report.cases, key=lambda case: order[case.benchmark])
    return [_section(name, list(group), report.machine) for name, group in groupby(cases, lambda c: c.benchmark)]


def _section(name: str, cases: Sequence[CaseResult], machine: Machine) -> Section:
    benchmark = BENCHMARKS[name]
    relation = "against" if benchmark.shows == "speedup" else "cost over"
    rows = [_row(case, machine) for case in cases if case.ours]
    return Section(name, benchmark.title, cases[0].point.sizes(), relation, rows, list(_notes(cases)))


def _row(case: CaseResult, machine: Machine) -> Row:
    ratio = case.speedup if BENCHMARKS[case.benchmark].shows == "speedup" else case.cost
    peak = machine.peaks[case.threads].get(case.point.dtype) if case.unit == "FLOP" else None
    return Row(
        case=case.point.label(),
        threads=str(case.threads or "-"),
        milliseconds=significant(case.seconds() * 1e3),
        rate=f"{rate_text(case.rate())}{case.unit}/s",
        of_peak=f"{case.rate() / peak:.0%}" if peak else "-",
        ratios={who: ratio_text(ratio(who)) for who in case.baselines},
    )


def _notes(cases: Sequence[CaseResult]) -> Iterator[str]:
    """Who was not run, with the reason and where; the same reason is told once."""
    reasons: dict[str, list[str]] = {}
    for case in cases:
        missing = {"ours": case.unavailable} if case.unavailable else case.missing
        for who, reason in missing.items():
            reasons.setdefault(f"{who}: {reason}", []).append(case.point.label())
    for text, where in reasons.items():
        points = list(dict.fromkeys(where))
        everywhere = len(where) == len(cases)
        yield f"Not run: {text}" + ("" if everywhere else f" ({', '.join(points)})")


def significant(value: float) -> str:
    """Three digits, without an exponent."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"


def rate_text(rate: float) -> str:
    """142 G, 1.21 T."""
    factor = next((factor for factor in _PREFIX if rate >= factor), 1e6)
    return f"{significant(rate / factor)} {_PREFIX[factor]}"


def ratio_text(ratio: Spread) -> str:
    """Median and quartiles."""
    return f"{ratio.median:.2f}× ({ratio.low:.2f}–{ratio.high:.2f})"


def machine_lines(report: Report) -> list[str]:
    """What, when, where."""
    machine = report.machine
    assert machine is not None
    lines = [
        f"Machine: {machine.name}; {machine.cores} cores; {' '.join(machine.flags) or 'no wide instructions'}",
        f"torch {machine.torch}; our operators: {machine.extension}"
        + (f"; commit {machine.commit}" if machine.commit else ""),
        f"{report.started}, {report.seconds:.0f} s; load average {report.load_before:.1f} before, "
        f"{report.load_after:.1f} after",
    ]
    if report.load_before > machine.cores / 2:
        # Libraries with a barrier for each expert fall behind a hundredfold when a core is taken from them.
        lines.append("The machine was busy when this began: quote none of it, least of all of several threads")
    for threads, rates in machine.peaks.items():
        text = ", ".join(f"{dtype} {rate_text(rate)}FLOP/s" for dtype, rate in rates.items())
        lines.append(f"Peak (best large torch.mm{f', {threads} threads' if threads > 1 else ''}): {text}")
    return lines


HOW_TO_READ = (
    "Ours and the baselines take turns (A B A B). A ratio is the median of the pairs' ratios, with quartiles. "
    "“Against” is the baseline's time over ours: above 1×, ours is faster. “Cost over” is ours over the baseline's, "
    "where that does less. One CPU thread: CPU time of the thread; several: wall time; CUDA: events. All results were "
    "compared before they were timed."
)


def markdown(report: Report) -> str:
    """The page."""
    parts = ["# Operators, measured", MARK, HOW_TO_READ, f"```\n{report.settings.command()}\n```"]
    parts.append("\n".join(f"- {line}" for line in machine_lines(report)))
    for section in sections(report):
        parts += [f"## {section.name}", f"{section.title}. {section.sizes}."]
        if section.rows:
            parts.append(_markdown_table(section))
        if section.notes:
            parts.append("\n".join(f"- {note}" for note in section.notes))
    return "\n\n".join(parts) + "\n"


def _markdown_table(section: Section) -> str:
    baselines = section.baselines()
    head = ["case", "threads", "ours, ms", "rate", "of peak", *(f"{section.relation} {who}" for who in baselines)]
    lines = [head, ["---"] * len(head)]
    for row in section.rows:
        ratios = [row.ratios.get(who, "-") for who in baselines]
        lines.append([row.case, row.threads, row.milliseconds, row.rate, row.of_peak, *ratios])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_json(report: Report) -> dict[str, Any]:
    """Everything, every time of every round included."""
    return {"command": report.settings.command(), **asdict(report)}


def check_target(path: Path, mark: str = MARK) -> None:
    """Before anything is measured. ConfigError unless `path` can be written, and holds nothing but an older table."""
    if not path.parent.is_dir():
        raise ConfigError(f"--write {path}: the folder {path.parent} is not there")
    if path.is_dir():
        raise ConfigError(f"--write {path} is a folder; name a file")
    if path.exists() and mark not in path.read_text(encoding="utf-8", errors="replace"):
        raise ConfigError(f"--write {path}: the file is there and was not written by this command; name another")


def write(report: Report, path: Path) -> None:
    """Whole or not at all."""
    whole = path.with_name(f".{path.name}.new")
    whole.write_text(markdown(report), encoding="utf-8")
    whole.replace(path)
