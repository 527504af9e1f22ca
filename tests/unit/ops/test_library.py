"""Finding and loading the compiled operators."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from moetrain import ops
from moetrain.errors import DependencyError
from moetrain.ops import library


def test_the_loaded_extension_says_what_it_is():
    info = ops.extension_info()
    assert info.path.is_file()
    assert info.cpu_isa in {"amx", "avx512", "avx2", "base"}
    assert torch.__version__.startswith(info.built_with_torch.rsplit(".", 1)[0])
    assert isinstance(info.cuda, bool)


def test_an_absent_library_tells_how_to_build_it(monkeypatch, tmp_path):
    monkeypatch.setenv("MOETRAIN_OPS_LIBRARY", str(tmp_path / "absent.so"))
    with pytest.raises(library.ExtensionError, match="--no-build-isolation") as caught:
        library._find()
    assert str(tmp_path) in str(caught.value)
    assert isinstance(caught.value, DependencyError)
    assert isinstance(caught.value, ImportError)


def test_a_library_that_does_not_load_is_named(monkeypatch, tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setenv("MOETRAIN_OPS_LIBRARY", str(broken))
    with pytest.raises(library.ExtensionError, match=r"broken\.so does not load into torch"):
        library._load()


def test_a_library_of_another_torch_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "1.2.3")
    with pytest.raises(library.ExtensionError, match=r"was built with torch .* and loaded into 1\.2\.3"):
        library._load()


def test_the_newest_build_wins(monkeypatch, tmp_path):
    monkeypatch.delenv("MOETRAIN_OPS_LIBRARY", raising=False)
    old, new = tmp_path / "old.so", tmp_path / "new.so"
    for age, path in ((100, old), (200, new)):
        path.touch()
        os.utime(path, (age, age))
    monkeypatch.setattr(library, "_candidates", lambda: [old, new])
    assert library._find() == new


def test_importing_the_operators_brings_no_framework():
    frameworks = ("megatron", "deepspeed", "transformers")
    code = f"import sys, moetrain.ops; print([name for name in {frameworks} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
