"""The page: what stands in it, and what it never overwrites."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moetrain.bench import report as page
from moetrain.bench.results import CaseResult, Machine, Point
from moetrain.bench.runner import Report
from moetrain.bench.settings import default_settings
from moetrain.errors import ConfigError

BALANCED = Point("cpu", "bf16", 64, 32, 8, 16, 2, "balanced")
SKEWED = Point("cpu", "bf16", 64, 32, 8, 16, 2, "zipf")
ATTENTION = Point("cpu", "fp32", 64, 32, heads=8, measure="row_max", causal=True)


def report(*cases: CaseResult) -> Report:
    machine = Machine("A processor", 2, ["avx2"], "2.13", "CPU kernels", "abc", {1: {"bf16": 4e9, "fp32": 4e9}})
    return Report(default_settings("cpu", 2), "2026-01-02 03:04 UTC", 0.5, machine, list(cases), 0.7, 12.0)


@pytest.fixture
def full() -> Report:
    times = {"A": [4.0, 2.0, 6.0], "B": [30.0]}
    return report(
        CaseResult("combine", BALANCED, 1, [0.5], {"A": [0.25]}, work=1e9, unit="B"),
        CaseResult("fprop", BALANCED, 1, [2.0, 2.0, 2.0], times, work=2e9),
        CaseResult("fprop", SKEWED, 1, [1.0], {"A": [2.0]}, {"B": "would pad"}, work=2e9),
        CaseResult("attention_rows", ATTENTION, 1, unavailable="this build has none"),
    )


def lines(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def test_a_row_has_time_rate_share_of_the_peak_and_each_ratio_with_quartiles(full: Report) -> None:
    text = page.markdown(full)
    assert lines(text, "| case | threads | ours, ms | rate | of peak | against A | against B |")
    assert lines(text, "| bf16 E=8 F=16 bal")[0] == (
        "| bf16 E=8 F=16 balanced | 1 | 2000 | 1.00 GFLOP/s | 25% | 2.00× (1.50–2.50) | 15.00× (15.00–15.00) |"
    )


def test_sections_stand_in_the_catalogs_order_and_bytes_have_no_peak(full: Report) -> None:
    text = page.markdown(full)
    assert lines(text, "## ") == ["## fprop", "## combine", "## attention_rows"]
    assert "| bf16 E=8 F=16 balanced | 1 | 500 | 2.00 GB/s | - | 0.50× (0.50–0.50) |" in text


def test_what_was_not_run_is_listed_with_reason_and_place(full: Report) -> None:
    text = page.markdown(full)
    assert lines(text, "| bf16 E=8 F=16 zipf")[0].endswith("| 2.00× (2.00–2.00) | - |")
    assert lines(text, "- Not run") == [
        "- Not run: B: would pad (bf16 E=8 F=16 zipf)",
        "- Not run: ours: this build has none",
    ]


def test_the_page_tells_command_machine_date_commit_and_load(full: Report) -> None:
    text = page.markdown(full)
    for words in (
        "moetrain bench ops --device cpu --threads 1,2 --dtype bf16,fp32 --experts 8,16,64",
        "A processor; 2 cores; avx2",
        "commit abc",
        "2026-01-02 03:04 UTC, 12 s; load average 0.5 before, 0.7 after",
        "bf16 4.00 GFLOP/s",
    ):
        assert words in text


def test_a_page_from_a_busy_machine_says_so(full: Report) -> None:
    assert "machine was busy" not in page.markdown(full)
    full.load_before = 1.5
    assert "The machine was busy when this began" in page.markdown(full)


def test_a_cost_is_ours_over_theirs() -> None:
    text = page.markdown(
        report(CaseResult("attention_rows", ATTENTION, 1, [1.1], {"attention alone": [1.0]}, work=1.0))
    )
    assert "cost over attention alone" in text and "1.10×" in text


def test_json_has_every_time(full: Report) -> None:
    values = json.loads(json.dumps(page.to_json(full)))
    assert values["cases"][1]["baselines"] == {"A": [4.0, 2.0, 6.0], "B": [30.0]}
    assert values["machine"]["peaks"] == {"1": {"bf16": 4e9, "fp32": 4e9}}
    assert values["command"].startswith("moetrain bench ops")


@pytest.mark.parametrize(
    ("value", "text"), [(0.0123, "0.012"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123"), (12345.6, "12346")]
)
def test_numbers_have_about_three_digits(value: float, text: str) -> None:
    assert page.significant(value) == text


@pytest.mark.parametrize(("rate", "text"), [(2.5e12, "2.50 T"), (2.5e9, "2.50 G"), (2.5e6, "2.50 M"), (1e3, "0.001 M")])
def test_rates_have_a_prefix(rate: float, text: str) -> None:
    assert page.rate_text(rate) == text


# --- writing --------------------------------------------------------------------------------------------------------


def test_a_page_of_this_command_is_replaced(full: Report, tmp_path: Path) -> None:
    path = tmp_path / "ops.md"
    page.write(report(), path)
    page.check_target(path)
    page.write(full, path)
    assert path.read_text(encoding="utf-8") == page.markdown(full)
    assert list(tmp_path.iterdir()) == [path]


def test_a_page_of_somebody_else_is_not(tmp_path: Path) -> None:
    path = tmp_path / "ops.md"
    path.write_text("my notes\n")
    with pytest.raises(ConfigError, match="was not written by this command"):
        page.check_target(path)


def test_a_folder_that_is_not_there_and_a_folder_as_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the folder .*gone is not there"):
        page.check_target(tmp_path / "gone" / "ops.md")
    with pytest.raises(ConfigError, match="is a folder; name a file"):
        page.check_target(tmp_path)
