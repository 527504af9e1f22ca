"""Tests of the CUDA twins: they skip themselves, with the reason, where there is no GPU or no CUDA kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moetrain import ops


def _why_not() -> str | None:
    if not torch.cuda.is_available():
        return "there is no GPU"
    if not ops.extension_info().cuda:
        return f"{ops.extension_info().path} was built without CUDA kernels (MOETRAIN_CUDA)"
    return None


def pytest_collection_modifyitems(items):
    reason = _why_not()
    if reason is None:
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f"ops on a GPU: {reason}"))


@pytest.fixture
def poison():
    """Fills everything that ``at::empty`` hands out with NaN (the largest number for integers): an element that a
    kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["own", "torch"])
def library(request, monkeypatch):
    """Whose bfloat16 products are used."""
    monkeypatch.setenv("MOETRAIN_CUDA_GEMM", request.param)
    return request.param
