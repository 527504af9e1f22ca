"""What `moetrain claims` refuses, before anything is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from moetrain.testing import run_cli


@pytest.mark.parametrize("study", ["hypermoe", "damoe"])
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--write", "page.txt"], "--write (page.txt) must name a .md file"),
        (["--write", "notes.md"], "--write (notes.md) is there and no report of claims; nothing was touched"),
        (["--jobs", "999"], "--jobs (999) must not exceed the cores of this process"),
        (["--corpus", "absent.jsonl"], "input absent.jsonl: no such file"),
    ],
)
def test_a_mistake_costs_nothing(study: str, words: list[str], told: str, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("# mine\n", encoding="utf-8")
    result = run_cli(["claims", study, "--out", "lab", *words], tmp_path)
    assert result.code == 2
    assert told in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.rglob("*.bin"))
    assert (tmp_path / "notes.md").read_text(encoding="utf-8") == "# mine\n"
