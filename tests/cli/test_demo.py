"""`moetrain demo`: whole, at a tiny size, and the rules by which it goes on, starts over and fails."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from moetrain.cli.demo import _run, app
from moetrain.cli.demo_folder import MARKER, DemoFolder, Record, Stage, open_folder
from moetrain.cli.demo_plan import Files, Plan, kill_step, make_plan
from moetrain.cli.demo_stages import metric_rows
from moetrain.cli.demo_summary import problems
from moetrain.config.layout import check_layout
from moetrain.errors import ConfigError, MoetrainError

CHECKOUT = Path(__file__).parents[2]
CONFIG = CHECKOUT / "configs" / "demo.yaml"
TINY = (
    *("--iters", "12", "--corpus-bytes", "400000"),
    *("model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64", "model.vocab_size=512"),
    *("model.seq_length=32", "training.eval_iters=2"),
)


def plan(root: Path, *overrides: str, iters: int | None = None) -> Plan:
    return make_plan(root, CONFIG, overrides, iters, processes=4, corpus_bytes=10**6)


# --- the whole demo -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    files: Files
    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def call(root: Path, *words: str) -> Finished:
    done = subprocess.run(
        [sys.executable, "-m", "moetrain", "demo", "--dir", str(root), *TINY, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        cwd=root.parent,
    )
    return Finished(Files(root), done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One demo, for all tests of this file."""
    return call(tmp_path_factory.mktemp("demo") / "demo", "--no-quality-gate")


def test_the_demo_succeeds_and_leaves_everything_that_its_summary_names(finished: Finished) -> None:
    assert finished.exit_code == 0, finished.output
    files = finished.files
    for path in (files.corpus, files.held_out, files.tokenizer, *files.indexed, files.config, files.hf / "config.json"):
        assert path.is_file(), path
        assert path.stat().st_size
    assert files.latest.read_text().strip() == "step-00000012"
    assert list((files.run / "tensorboard").glob("events*"))
    summary = finished.stdout.partition("Summary\n")[2]
    for words in (
        "held-out loss",
        "unigram entropy",
        "tokens/s",
        "Seconds",
        str(files.hf),
        "tensorboard.main --logdir",
    ):
        assert words in summary


def test_every_process_was_killed_between_two_checkpoints_and_the_run_resumed_from_the_first(
    finished: Finished,
) -> None:
    stages = json.loads((finished.files.root / MARKER).read_text())["stages"]
    killed, resumed = stages["train"]["result"], stages["resume"]["result"]
    assert 0 < killed["checkpoint"] < killed["killed_at"] < 12
    assert resumed["resumed_at"] == killed["checkpoint"]
    assert killed["killed_processes"] == 4 + 2  # the ranks, torchrun, the launcher
    assert f"resumed at step {killed['checkpoint']}" in finished.output
    told = {str(finished.files.root), "moetrain"}
    left = [process for process in psutil.process_iter(["cmdline"]) if told <= set(process.info["cmdline"] or [])]
    assert not left


def test_the_second_run_took_another_layout_and_every_step_is_recorded_once(finished: Finished) -> None:
    assert "made on 4 ranks = tensor 1 x data 2 x pipeline 2" in finished.output
    assert "4 ranks = tensor 2 x data 2 x pipeline 1" in finished.output
    steps = [row["iteration"] for row in metric_rows(finished.files, "train")]
    assert steps == list(range(1, 13))


def test_transformers_gives_our_logits(finished: Finished) -> None:
    stages = json.loads((finished.files.root / MARKER).read_text())["stages"]
    assert stages["logits"]["result"]["positions"] > 0
    assert stages["logits"]["result"]["max_abs"] <= 1e-4


def test_transformers_goes_on_from_each_prompt(finished: Finished) -> None:
    stages = json.loads((finished.files.root / MARKER).read_text())["stages"]
    samples = stages["generate"]["result"]["samples"]
    assert len(samples) == 3
    for sample in samples:
        assert sample["text"].startswith(sample["prompt"])
        assert len(sample["text"]) > len(sample["prompt"])


def test_the_commands_that_the_summary_suggests_are_ones_that_exist(finished: Finished) -> None:
    commands = [shlex.split(line) for line in finished.stdout.partition("\nNext\n")[2].splitlines() if line.strip()]
    assert len(commands) == 5
    check = next(command for command in commands if "check" in command)
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(
        check, capture_output=True, text=True, check=False, cwd=finished.files.root.parent, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "tensor 2 x data 2 x pipeline 1" in done.stdout


def test_a_second_call_does_nothing_again_and_judges_what_is_there(finished: Finished) -> None:
    before = finished.files.latest.stat().st_mtime_ns
    again = call(finished.files.root)
    assert again.output.count("done before") == 8
    assert finished.files.latest.stat().st_mtime_ns == before
    # Twelve steps are too few for any model: without --no-quality-gate that is a failure, and said.
    assert again.exit_code == 1, again.output
    assert "is not below the unigram entropy" in again.output


def test_other_settings_are_refused_by_name_and_change_nothing(finished: Finished) -> None:
    before = (finished.files.root / MARKER).read_bytes()
    refused = call(finished.files.root, "optimizer.lr=0.001")
    assert refused.exit_code == 2
    assert "config.optimizer.lr: 0.004 there, 0.001 now" in refused.output
    assert (finished.files.root / MARKER).read_bytes() == before


# --- its plan -------------------------------------------------------------------------------------------------------


def test_the_second_layout_splits_weights_layers_experts_and_optimizer_otherwise(tmp_path: Path) -> None:
    made = plan(tmp_path)
    first, second = (check_layout(config, 4) for config in (made.first, made.second))
    assert (first.pipeline, first.expert, made.first.zero.stage) == (2, 2, 1)
    assert first.tensor != second.tensor
    assert first.pipeline != second.pipeline
    assert first.expert_data != second.expert_data
    assert made.second.parallel.sequence
    assert made.second.zero.stage == 2


@pytest.mark.parametrize("iters", [8, 12, 37, 300, 5000])
def test_a_run_of_any_length_is_killed_past_its_middle_and_between_checkpoints(tmp_path: Path, iters: int) -> None:
    made = plan(tmp_path, iters=iters)
    save = made.first.checkpoint.save_interval
    assert made.first.training.train_iters == iters
    assert max(iters // 2, save + 1) <= made.kill_at < iters
    assert made.kill_at % save
    assert made.kill_at % made.first.training.log_interval == 0


@pytest.mark.parametrize("save", [0, 1, 300])
def test_a_run_without_a_moment_to_be_killed_is_refused(tmp_path: Path, save: int) -> None:
    with pytest.raises(ConfigError, match="no moment at which to kill"):
        plan(tmp_path, f"checkpoint.save_interval={save}")


def test_the_kill_waits_for_the_first_checkpoint(tmp_path: Path) -> None:
    config = plan(tmp_path, "checkpoint.save_interval=200").first
    assert kill_step(config) == 210


def test_a_plan_that_cannot_be_followed_leaves_nothing(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["--dir", str(tmp_path / "demo"), "-n", "3"])
    assert isinstance(result.exception, MoetrainError)
    assert not (tmp_path / "demo").exists()


# --- its folder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_that_no_demo_made_is_refused_and_left_alone(tmp_path: Path, fresh: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"thesis\.tex"), open_folder(tmp_path, {}, fresh):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("text", ["", "{}", '{"format": "other", "settings": {}, "stages": {}}', "[1]"])
def test_fresh_trusts_no_marker_but_its_own(tmp_path: Path, text: str) -> None:
    (tmp_path / MARKER).write_text(text)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=MARKER), open_folder(tmp_path, {}, fresh=True):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_fresh_follows_no_link_out_of_the_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    with open_folder(tmp_path / "demo", {}, fresh=False):
        (tmp_path / "demo" / "link").symlink_to(outside)
    with open_folder(tmp_path / "demo", {}, fresh=True):
        assert not (tmp_path / "demo" / "link").is_symlink()
    assert (outside / "kept").read_text() == "x"
    (tmp_path / "alias").symlink_to(tmp_path / "demo")
    with pytest.raises(ConfigError, match="is a link"), open_folder(tmp_path / "alias", {}, fresh=True):
        pass


def test_fresh_forgets_the_earlier_demo_and_its_settings(tmp_path: Path) -> None:
    with open_folder(tmp_path / "demo", {"a": 1}, fresh=False) as folder:
        folder.record(Stage("corpus", "", dict), Record(1.0, {}))
        (folder.path / "big").write_text("x")
    with open_folder(tmp_path / "demo", {"a": 2}, fresh=True) as folder:
        assert folder.records == {}
        assert not (folder.path / "big").exists()


def test_two_demos_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        open_folder(tmp_path, {}, fresh=False),
        pytest.raises(ConfigError, match="another demo is running"),
        open_folder(tmp_path, {}, fresh=True),
    ):
        pass


# --- going on, and judging ------------------------------------------------------------------------------------------


def _chain(root: Path, done: list[str], *, broken: bool) -> list[Stage]:
    """Three stages that write a file each; the second fails half-way while `broken`."""

    def stage(name: str, continues: bool = False) -> Stage:
        path = root / name

        def run() -> dict[str, str]:
            before = path.read_text() if path.exists() else ""
            path.write_text(f"{before}{name}")
            if broken and name == "b":
                raise MoetrainError("b fails")
            done.append(name)
            return {"made": name}

        return Stage(name, name, run, (path,), continues)

    return [stage("a"), stage("b"), stage("c", continues=True)]


def test_after_a_failure_finished_stages_stay_and_half_files_do_not(tmp_path: Path) -> None:
    done: list[str] = []
    with open_folder(tmp_path, {}, fresh=False) as folder, pytest.raises(MoetrainError, match="b fails"):
        _run(folder, _chain(tmp_path, done, broken=True))
    (tmp_path / "c").write_text("half, ")
    with open_folder(tmp_path, {}, fresh=False) as folder:
        stages = _chain(tmp_path, done, broken=False)
        folder.check_outputs(stages)
        _run(folder, stages)
        assert {name: record.result for name, record in folder.records.items()} == {
            name: {"made": name} for name in "abc"
        }
    assert done == ["a", "b", "c"]
    assert (tmp_path / "b").read_text() == "b"
    assert (tmp_path / "c").read_text() == "half, c"  # training goes on from what is there


def test_a_finished_stage_whose_files_are_gone_is_named(tmp_path: Path) -> None:
    stages = _chain(tmp_path, [], broken=False)
    with open_folder(tmp_path, {}, fresh=False) as folder:
        _run(folder, stages)
    (tmp_path / "a").unlink()
    with open_folder(tmp_path, {}, fresh=False) as folder, pytest.raises(ConfigError, match="'a'"):
        folder.check_outputs(stages)


@pytest.mark.parametrize(
    ("loss", "difference", "gate", "found"),
    [
        (5.0, 1e-6, True, []),
        (5.9, 1e-6, True, ["not below the unigram entropy"]),
        (5.9, 1e-6, False, []),
        (float("nan"), 1e-6, True, ["not below the unigram entropy"]),
        (5.0, 2e-4, False, ["logits differ"]),
        (5.0, float("nan"), True, ["logits differ"]),
    ],
)
def test_what_counts_as_failure(tmp_path: Path, loss: float, difference: float, gate: bool, found: list[str]) -> None:
    made = plan(tmp_path)
    made.files.run.mkdir()
    row = {"kind": "eval", "iteration": 300, "eval/loss": loss, "eval/unigram_entropy": 5.5}
    (made.files.run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    folder = DemoFolder(tmp_path, {}, {"logits": Record(1.0, {"max_abs": difference})})
    told = problems(folder, made, gate)
    assert len(told) == len(found)
    assert all(words in sentence for words, sentence in zip(found, told, strict=True))


def test_help_loads_no_torch() -> None:
    code = "import sys\nfrom moetrain.cli.demo import app\nassert 'torch' not in sys.modules\napp(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=CHECKOUT)
    assert done.returncode == 0, done.stderr
    assert "--fresh" in done.stdout
