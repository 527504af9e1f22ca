"""`moetrain --help` and `moetrain config`, as a user runs them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from moetrain.cli.app import VERBS, app, load_verb, main
from moetrain.config.loader import load_config
from moetrain.errors import ConfigError, DependencyError

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "configs" / "demo.yaml")


def run_cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moetrain", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("arguments", [["--help"], ["config", "check", DEMO, "--world-size", "4"]])
def test_light_commands_are_quick_and_import_no_torch(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from moetrain.cli.app import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "except SystemExit as done:\n"
        "    heavy = {'torch', 'deepspeed', 'megatron', 'transformers'} & set(sys.modules)\n"
        "    sys.exit(done.code or (f'imported {heavy}' if heavy else 0))\n"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 10  # about 0.4 s on an idle machine; torch alone would take longer than that


def test_help_lists_every_verb_with_its_line() -> None:
    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    for name, verb in VERBS.items():
        assert name in text and verb.summary in text


def test_every_verb_in_the_table_has_its_module() -> None:
    missing = [name for name, verb in VERBS.items() if importlib.util.find_spec(verb.module) is None]
    assert missing == []


def test_an_unknown_verb_is_refused_with_the_nearest() -> None:
    done = run_cli("cofig")
    assert done.returncode == 2 and "config" in done.stderr and "Traceback" not in done.stderr


def test_a_verb_whose_package_is_missing_says_which(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "needs_absent.py").write_text("import a_package_that_is_absent\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(VERBS, "config", VERBS["config"]._replace(module="needs_absent"))
    with pytest.raises(DependencyError, match=r"`moetrain config` needs the package 'a_package_that_is_absent'"):
        load_verb("config")


def test_a_mistake_is_one_message_on_stderr_with_exit_code_2() -> None:
    done = run_cli("config", "check", DEMO, "model.moe.router.topk=3", "parallel.tensor=[1]")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: 2 problems in the configuration:\n")
    assert "did you mean model.moe.router.top_k? [override 'model.moe.router.topk=3']" in done.stderr
    assert "parallel.tensor: [1] must be a whole number" in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback() -> None:
    done = run_cli("config", "check", DEMO, "a=1", MOETRAIN_DEBUG="1")
    assert done.returncode != 0 and "Traceback" in done.stderr and "ConfigError" in done.stderr


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (ConfigError("bad"), 2)])
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.delenv("MOETRAIN_DEBUG", raising=False)
    monkeypatch.setattr("moetrain.cli.config.load_config", fail)
    with pytest.raises(SystemExit) as done:
        main(["config", "show", DEMO])
    assert done.value.code == code
    assert capsys.readouterr().err.strip() in ("", "error: bad")


def test_our_own_faults_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("broken invariant")

    monkeypatch.setattr("moetrain.cli.config.load_config", fail)
    with pytest.raises(AssertionError, match="broken invariant"):
        main(["config", "show", DEMO])


def test_check_says_what_the_run_is() -> None:
    words = ["config", "check", DEMO, "training.global_batch_size=16", "--world-size", "4"]
    text = CliRunner().invoke(app, words).output
    assert "2.97M total, 1.79M active per token" in text
    assert "4 ranks = tensor 1 x data 2 x pipeline 2; experts: expert 2 x data 1" in text
    assert "2 micro-batches of 4" in text
    assert text.rstrip().endswith("ok")


def test_check_states_the_ceiling_of_dispatch_and_max_rows_lowers_it() -> None:
    lines = []
    for words in ([], ["model.moe.dispatch.max_rows=64"]):
        text = CliRunner().invoke(app, ["config", "check", DEMO, *words]).output
        lines.append(next(line for line in text.splitlines() if line.startswith("dispatch")))
    assert "any number of rows at once: at most" in lines[0]
    assert "64 rows at once: at most" in lines[1]
    sizes = [float(re.search(r"at most ([\d.]+)MB", line)[1]) for line in lines]  # pyright: ignore
    assert sizes[1] < sizes[0]


def test_check_without_a_world_size_says_which_would_do() -> None:
    text = CliRunner().invoke(app, ["config", "check", DEMO]).output
    assert "a multiple of 4 ranks" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([DEMO, "--world-size", "6"], "parallel.expert (2) must divide the ranks of one pipeline stage (6 / 2 = 3)"),
        ([DEMO, "optimizer.schedule.min_lr=1"], "optimizer.schedule.min_lr (1) must not exceed optimizer.lr"),
        (["model.num_layers=2"], "no configuration file given"),
        (["absent.yaml"], "absent.yaml: cannot be read"),
    ],
)
def test_check_refuses_what_could_not_start(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["config", "check", *words])
    assert done.value.code == 2 and message in capsys.readouterr().err


def test_show_prints_yaml_that_loads_to_the_same_run(tmp_path: Path) -> None:
    overrides = ["training.seed=7", "model.moe.hyper=null"]
    shown = tmp_path / "shown.yaml"
    shown.write_text(CliRunner().invoke(app, ["config", "show", DEMO, *overrides]).stdout)
    assert load_config([shown]) == load_config([DEMO], overrides)


def test_a_file_with_an_equal_sign_in_its_name_is_a_file(tmp_path: Path) -> None:
    odd = tmp_path / "lr=1.yaml"
    odd.write_text("training: {seed: 99}")
    shown = CliRunner().invoke(app, ["config", "show", DEMO, str(odd)]).stdout
    assert yaml.safe_load(shown)["training"]["seed"] == 99


def test_schema_is_json_schema() -> None:
    schema = json.loads(CliRunner().invoke(app, ["config", "schema"]).stdout)
    assert "model" in schema["properties"] and schema["title"] == "RunConfig"
