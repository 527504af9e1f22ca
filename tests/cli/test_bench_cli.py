"""`moetrain bench ops` from end to end at tiny sizes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moetrain.testing import run_cli

TINY = ("--threads", "1", "--experts", "4", "--ffn", "8", "--hidden", "16", "--tokens", "16", "--budget", "0.2")


def bench(folder: Path, *words: str):
    return run_cli(["bench", "ops", *words], folder)


def refusal(folder: Path, *words: str) -> str:
    """The error of a command that is refused before anything is measured."""
    result = bench(folder, *words)
    assert result.code == 2, result
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr
    assert result.stdout == ""
    return result.stderr.removeprefix("error: ")


def test_tables_go_to_the_terminal_and_to_a_page(tmp_path: Path) -> None:
    chosen = ("--only", "fprop,plan", "--dtype", "fp32", "--routing", "balanced,all_to_one")
    result = bench(tmp_path, *TINY, *chosen, "--experts", "16", "--write", "ops.md")
    assert result.code == 0, result
    assert "fprop: Grouped product, forward" in result.stdout and "plan: Sorting slots by expert" in result.stdout
    assert "bench ops: 4/4, plan int64 E=16 all_to_one, about 0 s left" in result.stderr
    page = (tmp_path / "ops.md").read_text(encoding="utf-8")
    for words in (
        "moetrain bench ops --device cpu --threads 1 --dtype fp32 --experts 16",
        "| against F.grouped_mm | against padded bmm |",
        "| fp32 E=16 F=8 balanced | 1 |",
        "- Not run: padded bmm: would pad 32 rows to 512, more than 8 times as many (fp32 E=16 F=8 all_to_one)",
        "## plan",
    ):
        assert words in page, page


def test_json_is_all_that_goes_to_standard_output(tmp_path: Path) -> None:
    result = bench(tmp_path, *TINY, "--only", "combine", "--dtype", "bf16", "--json", "--quiet")
    assert result.code == 0, result
    assert result.stderr == ""
    report = json.loads(result.stdout)
    assert [case["point"]["routing"] for case in report["cases"]] == ["balanced", "zipf", "all_to_one"]
    assert all(len(case["ours"]) == len(case["baselines"]["index_add"]) >= 3 for case in report["cases"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--device", "tpu"), '--device: "tpu" is unknown; legal: cpu, cuda'),
        (("--dtype", "bf16,fp8"), '--dtype: "fp8" is unknown; legal: bf16, fp32'),
        (("--routing", ""), '--routing: "" is unknown; legal: balanced, zipf, all_to_one'),
        (("--only", "fprops"), '--only: "fprops" is unknown; legal: fprop, gathered_fprop,'),
        (("--experts", "8,x"), '--experts: "x" in "8,x" must be a whole number of at least 1'),
        (("--ffn", "0"), '--ffn: "0" in "0" must be a whole number of at least 1'),
        (("--threads", "4096"), "--threads (4096) must not exceed the cores of this process"),
        (("--device", "cuda", "--threads", "1"), "--threads (1) means nothing with --device cuda"),
        (("--experts", "2,8", "--top-k", "3"), "--top-k (3) must not exceed the fewest --experts (2)"),
        (("--budget", "0"), "--budget (0) must be above 0 seconds"),
        (("--budget", "nan"), "--budget (nan) must be above 0 seconds"),
        (("--write", "gone/ops.md"), "the folder gone is not there"),
    ],
)  # fmt: skip
def test_a_bad_value_is_named_with_its_rule(tmp_path: Path, words: tuple[str, ...], error: str) -> None:
    assert error in refusal(tmp_path, *words)


def test_a_file_of_the_users_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("mine\n")
    assert "was not written by this command" in refusal(tmp_path, *TINY, "--write", "notes.md")
    assert (tmp_path / "notes.md").read_text() == "mine\n"


def test_saves_are_measured_and_nothing_stays_on_the_disk(tmp_path: Path) -> None:
    words = ["bench", "checkpoint", "--sizes", "1,2", "--rounds", "2", "--pass-seconds", "0.01", "--quiet"]
    result = run_cli([*words, "--write", "saves.md"], tmp_path)
    assert result.code == 0, result
    assert "stall" in result.stdout and [path.name for path in tmp_path.iterdir()] == ["saves.md"]
    page = (tmp_path / "saves.md").read_text(encoding="utf-8")
    assert "moetrain bench checkpoint --sizes 1,2 --rounds 2 --pass-seconds 0.01" in page
    assert "| state, MB | stall, s |" in page
    report = json.loads(run_cli([*words, "--json"], tmp_path).stdout)
    assert [round(one["nbytes"] / 1e6) for one in report["times"]] == [1, 2]
    assert all(len(one["stall"]) == len(one["copy"]) == 2 for one in report["times"])


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--sizes", "10,x"), '--sizes: "x" in "10,x" must be a whole number'),
        (("--folder", "gone"), "--folder gone: not a folder"),
        (("--sizes", "999999999"), "GB free; this needs"),
        (("--write", "gone/saves.md"), "the folder gone is not there"),
    ],
)
def test_saves_that_cannot_be_measured_are_refused(tmp_path: Path, words: tuple[str, ...], error: str) -> None:
    result = run_cli(["bench", "checkpoint", *words], tmp_path)
    assert result.code == 2 and error in result.stderr, result
