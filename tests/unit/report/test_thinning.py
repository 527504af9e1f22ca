"""Fewer numbers that show the same."""

from __future__ import annotations

import base64
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrain.report import page
from moetrain.report.metrics_table import Frames, Series
from moetrain.report.thinning import columns, columns_for, pack_ratios, pack_shares, pack_uint16, thin


def series(values: np.ndarray) -> Series:
    return Series(np.arange(len(values)), values.astype(np.float64))


@given(st.integers(1, 5000), st.integers(0, 2**32 - 1), st.integers(10, 600))
def test_ends_and_extremes_stay(count: int, seed: int, most: int) -> None:
    values = np.random.default_rng(seed).normal(size=count)
    kept = thin(series(values), most)
    assert len(kept.steps) <= most
    assert kept.steps[0] == 0 and kept.steps[-1] == count - 1
    assert (np.diff(kept.steps) > 0).all()
    assert {values.min(), values.max()} <= set(kept.values)
    np.testing.assert_array_equal(kept.values, values[kept.steps])


def test_a_single_nan_among_many_stays() -> None:
    values = np.linspace(0, 1, 10_000)
    values[6789] = np.nan
    assert 6789 in thin(series(values)).steps


def test_short_series_are_left_alone() -> None:
    short = series(np.arange(500))
    assert thin(short) is short


def test_columns_are_means_of_stretches_with_their_first_and_last_step() -> None:
    frames = Frames(np.array([1, 10, 20, 30]), np.array([[1, 0], [3, 0], [5, 2], [7, 4]], dtype=np.float32))
    spans, means = columns(frames, 2)
    assert spans == [(1, 10), (20, 30)]
    assert means.tolist() == [[2.0, 0.0], [6.0, 3.0]]
    assert columns(frames, 9)[0] == [(1, 1), (10, 10), (20, 20), (30, 30)]


def test_large_models_get_fewer_columns() -> None:
    assert columns_for(4, 8, 400_000) == 160
    assert columns_for(60, 256, 400_000) * 60 * 256 <= 400_000
    assert columns_for(1000, 1000, 400_000) == 8


@pytest.fixture
def as_the_page_reads(tmp_path: Path) -> list[float]:
    """The value of each of the 256 bytes, by the page's own script."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    script = (page.ASSETS / "heat.js").read_text()
    script += "\nfor (let i = 0; i < 256; i++) console.log(heatValue({ scale: 'ratio' }, i));"
    (tmp_path / "heat.js").write_text(script)
    done = subprocess.run([node, str(tmp_path / "heat.js")], check=True, capture_output=True, text=True)
    return [float(line) for line in done.stdout.split()]


def test_the_page_reads_ratios_back_to_three_percent(as_the_page_reads: list[float]) -> None:
    ratios = np.array([0.0, 1 / 32, 0.1, 0.5, 1.0, 1.3, 4.0, 64.0, 1000.0])
    read = [as_the_page_reads[byte] for byte in base64.b64decode(pack_ratios(ratios))]
    assert read[0] == 0
    np.testing.assert_allclose(read[1:], ratios[1:], rtol=0.03)


def test_ratios_beyond_the_scale_are_at_its_ends_and_only_nothing_is_0() -> None:
    assert list(base64.b64decode(pack_ratios(np.array([0.0, 1e-9, 1e9])))) == [0, 1, 255]


def test_shares_and_numbers_are_packed_to_the_byte() -> None:
    assert list(base64.b64decode(pack_shares(np.array([0.0, 0.5, 1.0])))) == [0, 128, 255]
    assert list(base64.b64decode(pack_uint16(np.array([1, 513, 65535])))) == [1, 0, 1, 2, 255, 255]


@pytest.mark.parametrize("name", page.SCRIPTS)
def test_every_script_parses(name: str) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    subprocess.run([node, "--check", str(page.ASSETS / name)], check=True)
