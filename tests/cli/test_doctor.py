"""`moetrain doctor` on this machine, and on machines that lack something or have something false."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moetrain.cli import doctor_libraries, doctor_machine
from moetrain.cli.app import app
from moetrain.cli.doctor_libraries import Finding, apex_finding, library_findings
from moetrain.cli.doctor_machine import machine_findings


def _install(folder: Path, name: str, version: str, files: dict[str, str], metadata: bool = True) -> None:
    """A package as pip would leave it in site-packages."""
    if metadata:
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on sys.path."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


HOSTILE = "raise SystemExit('an impostor was executed')\n"


def test_absent_apex_says_what_is_used_instead() -> None:
    finding = apex_finding()
    assert (finding.status, finding.required) == ("missing", False)
    assert "torch's fused AdamW" in finding.effect


@pytest.mark.parametrize(
    "files", [{}, {"apex/__init__.py": HOSTILE}, {"apex/__init__.py": HOSTILE, "apex/models.py": ""}]
)
def test_the_impostor_apex_is_recognized_and_never_run(site: Path, files: dict[str, str]) -> None:
    _install(site, "apex", "0.9.10.dev0", files)
    finding = apex_finding()
    assert finding.status == "wrong"
    assert "0.9.10.dev0" in finding.found and "not NVIDIA's" in finding.found
    assert "pip uninstall apex" in finding.effect
    assert "apex" not in sys.modules


def test_genuine_apex_needs_its_cuda_kernels_too(site: Path) -> None:
    _install(
        site,
        "apex",
        "0.1",
        {"apex/__init__.py": "", "apex/optimizers/__init__.py": "", "apex/optimizers/fused_adam.py": ""},
    )
    assert apex_finding().status == "wrong" and "without its CUDA kernels" in apex_finding().found
    (site / "amp_C.py").write_text("")
    finding = apex_finding()
    assert (finding.status, finding.found) == ("ok", "0.1") and "FusedAdam" in finding.effect
    assert "apex" not in sys.modules


def test_genuine_apex_without_metadata_is_recognized_by_its_files(site: Path) -> None:
    files = {"apex/__init__.py": "", "apex/optimizers/fused_adam.py": "", "amp_C.py": ""}
    _install(site, "apex", "", files, metadata=False)
    assert apex_finding().status == "ok"


def test_a_torch_that_moetrain_is_not_made_for_is_wrong(site: Path) -> None:
    _install(site, "moetrain", "9.9", {})
    metadata = site / "moetrain-9.9.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text() + "Requires-Dist: deepspeed==0.0.1\nRequires-Dist: torch>=2\n")
    findings = {finding.name: finding for finding in library_findings()}
    assert findings["deepspeed"].status == "wrong"
    assert findings["deepspeed"].effect == "moetrain 9.9 is made for deepspeed ==0.0.1"
    assert findings["torch"].status == "ok"


def test_prebuilt_cpu_adam_is_found_by_its_file(site: Path) -> None:
    _install(site, "deepspeed", "0.19.8", {"deepspeed/__init__.py": HOSTILE, "deepspeed/ops/adam/cpu_adam_op.so": ""})
    finding = next(f for f in doctor_libraries._deepspeed() if f.name == "DeepSpeed CPU Adam")
    assert finding.status == "ok"


def test_this_environment_has_the_required_libraries() -> None:
    findings = {finding.name: finding for finding in library_findings()}
    for name in (
        "Python",
        "torch",
        "gloo",
        "moetrain operators",
        "megatron-core",
        "deepspeed",
        "sentencepiece",
        "tokenizers",
        "tensorboard",
    ):
        assert findings[name].required and findings[name].status == "ok", findings[name]
    assert all(finding.effect for finding in findings.values())


def test_the_machine_is_described_and_nothing_of_it_is_required() -> None:
    findings = {finding.name: finding for finding in machine_findings()}
    assert set(findings) == {"C++ compiler", "nvcc", "cores and memory", "disk", "open files", "Slurm"}
    assert not any(finding.required for finding in findings.values())
    assert "cores" in findings["cores and memory"].found and "GiB free" in findings["disk"].found


def test_missing_tools_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("CXX", "CUDA_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    findings = {finding.name: finding.status for finding in machine_findings()}
    assert (findings["C++ compiler"], findings["nvcc"], findings["Slurm"]) == ("missing", "missing", "missing")


def test_a_compiler_that_does_not_run_is_wrong_and_half_a_slurm_as_well(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("g++", "sbatch"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 3\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}")
    findings = {finding.name: finding for finding in machine_findings()}
    assert findings["C++ compiler"].status == "wrong" and str(tmp_path / "g++") in findings["C++ compiler"].found
    assert (findings["Slurm"].status, findings["Slurm"].found) == ("wrong", "sbatch")


def test_a_low_limit_of_open_files_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1024))
    finding = next(f for f in doctor_machine.machine_findings() if f.name == "open files")
    assert finding.status == "wrong" and "ulimit -n" in finding.effect


@pytest.mark.parametrize(
    ("status", "required", "code"), [("ok", True, 0), ("missing", False, 0), ("missing", True, 1), ("wrong", True, 1)]
)
@pytest.mark.parametrize("as_json", [True, False])
def test_the_exit_code_tells_whether_something_required_is_amiss(
    monkeypatch: pytest.MonkeyPatch, status: str, required: bool, code: int, as_json: bool
) -> None:
    finding = Finding("piece [x]", status, "1.0 [red]", "its effect", required)  # type: ignore[arg-type]
    monkeypatch.setattr("moetrain.cli.doctor.library_findings", lambda: [finding])
    monkeypatch.setattr("moetrain.cli.doctor.machine_findings", list)
    done = CliRunner().invoke(app, ["doctor", *(["--json"] if as_json else [])])
    assert done.exit_code == code
    if as_json:
        report = json.loads(done.stdout)
        assert report["ok"] is (code == 0)
        assert report["findings"][0] | {} == {
            "name": "piece [x]", "status": status, "found": "1.0 [red]", "effect": "its effect", "required": required,
        }  # fmt: skip
    else:
        assert "piece [x]" in done.stdout and "1.0 [red]" in done.stdout
        assert ("required, but missing or wrong: piece [x]" in done.stdout) is (code == 1)
