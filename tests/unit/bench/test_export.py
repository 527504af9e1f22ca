"""The benchmark of exports, in small."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moetrain.bench.export import ALLOWED, config_of, measure_export
from moetrain.cli.bench import app
from moetrain.config.size import parameter_count
from moetrain.errors import MoetrainError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.mark.parametrize("gigabytes", [0.3, 20])
def test_the_model_has_the_size_that_is_asked_for(gigabytes: float, tmp_path: Path) -> None:
    model = config_of(round(gigabytes * 1e9), tmp_path).model
    assert 4 * parameter_count(model).total == pytest.approx(gigabytes * 1e9, rel=0.1)


def test_an_export_takes_little_more_memory_than_its_largest_block(tmp_path: Path) -> None:
    """400 MB of weights, and a bound that all of them together would exceed."""
    result = CliRunner().invoke(
        app, ["export", "--size", "0.4", "--dir", str(tmp_path), "--write", str(tmp_path / "page.md")]
    )
    assert result.exit_code == 0, result.output
    peak = int(next(line for line in result.output.splitlines() if line.startswith("peak above that")).split()[-2])
    assert 34 <= peak < 300
    assert "| peak above that |" in (tmp_path / "page.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


def test_too_little_disk_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(MoetrainError, match=r"needs 1100000000\.0 GB; its disk has"):
        measure_export(10**18, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert ALLOWED == 500_000_000
