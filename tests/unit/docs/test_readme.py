"""Every command and every claim of the README is backed: it runs here, or it names what runs it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

from moetrain.cli.app import app
from moetrain.cli.arguments import split_words
from moetrain.config.layout import check_layout
from moetrain.config.loader import load_config

from .reading import ROOT, console_commands, links, rows, split_fences

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = console_commands(README)


class Elsewhere(NamedTuple):
    """A command that is too heavy to run here: the file that runs it, and a text by which that file shows it."""

    file: str
    text: str


# Commands that run here, by their first words.
RUN_HERE = (
    ("moetrain", "doctor"),
    ("moetrain", "config", "check"),
    ("moetrain", "config", "show"),
    ("moetrain", "launch", "slurm"),
)

RUN_ELSEWHERE = {
    ("make", "setup"): Elsewhere(".ci/run", "make setup"),
    ("make", "test"): Elsewhere(".ci/run", "make test"),
    ("make", "demo"): Elsewhere("tests/cli/test_demo.py", "demo"),
    ("moetrain", "data", "corpus"): Elsewhere("tests/cli/test_data_cli.py", 'run("corpus"'),
    ("moetrain", "data", "tokenizer"): Elsewhere("tests/cli/test_data_cli.py", 'run("tokenizer"'),
    ("moetrain", "data", "prepare"): Elsewhere("tests/cli/test_data_cli.py", 'run("prepare"'),
    # The demo trains through `launch local`, which starts each rank as torchrun starts it here.
    ("moetrain", "launch", "local"): Elsewhere("moetrain/cli/demo_stages.py", '["launch", "local"'),
    ("torchrun",): Elsewhere("moetrain/launch/local.py", "torch.distributed.run"),
    ("moetrain", "report"): Elsewhere("tests/cli/test_report_cli.py", 'REPORT = ("report"'),
    ("moetrain", "convert", "to-hf"): Elsewhere("tests/unit/convert/test_hf.py", '["to-hf"'),
}


def kind_of(words: list[str]) -> tuple[str, ...] | None:
    """The known prefix of a command, or None."""
    return next((p for p in (*RUN_HERE, *RUN_ELSEWHERE) if tuple(words[: len(p)]) == p), None)


def title(words: list[str]) -> str:
    return " ".join(words[:4])


@pytest.fixture(autouse=True)
def _beside_the_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with our configurations, and those that the README has one write: their first line is their name."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for word, content in split_fences(README)[1]:
        if word == "yaml":
            path = tmp_path / content.splitlines()[0].removeprefix("# ")
            path.parent.mkdir(parents=True)
            path.write_text(content, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("words", COMMANDS, ids=title)
def test_every_command_runs_here_or_names_what_runs_it(words: list[str]) -> None:
    assert kind_of(words) is not None, f"nothing runs `{' '.join(words)}`: add it to RUN_HERE or RUN_ELSEWHERE"


def test_an_unknown_command_is_noticed() -> None:
    assert kind_of(["moetrain", "conjure"]) is None
    assert kind_of(["make", "coffee"]) is None


def test_the_tables_hold_nothing_that_the_readme_does_not_show() -> None:
    assert {kind_of(words) for words in COMMANDS} == {*RUN_HERE, *RUN_ELSEWHERE}


@pytest.mark.parametrize("words", [w for w in COMMANDS if kind_of(w) in RUN_HERE], ids=title)
def test_a_cheap_command_succeeds(words: list[str]) -> None:
    if words[1:3] == ["launch", "slurm"]:
        assert "--dry-run" in words and "--submit" not in words
    result = CliRunner().invoke(app, words[1:], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert result.output.strip()


@pytest.mark.parametrize(
    "words", [w for w in COMMANDS if w[0] == "moetrain" and kind_of(w) in RUN_ELSEWHERE], ids=title
)
def test_a_heavy_command_has_arguments_that_its_verb_takes(words: list[str]) -> None:
    """With --help the command line is parsed, which refuses an unknown verb or option, and nothing is run."""
    result = CliRunner().invoke(app, [*words[1:], "--help"])
    assert result.exit_code == 0, result.output
    assert CliRunner().invoke(app, [*words[1:], "--no-such-option", "--help"]).exit_code == 2


@pytest.mark.parametrize("elsewhere", sorted(set(RUN_ELSEWHERE.values())), ids=lambda e: e.file)
def test_what_runs_a_command_elsewhere_is_there(elsewhere: Elsewhere) -> None:
    assert elsewhere.text in (ROOT / elsewhere.file).read_text(encoding="utf-8")


def test_each_training_command_describes_a_legal_run_for_its_number_of_processes() -> None:
    checked = 0
    for words in COMMANDS:
        if kind_of(words) == ("moetrain", "launch", "local"):
            size, rest = int(words[words.index("-n") + 1]), words[words.index("-n") + 2 :]
        elif words[0] == "torchrun":
            size, rest = int(words[words.index("--nproc-per-node") + 1]), words[words.index("train") + 1 :]
        else:
            continue
        check_layout(load_config(*split_words(rest)), size)
        checked += 1
    assert checked == 2


def test_every_claim_links_to_its_proof() -> None:
    section = README.partition("## What it has")[2].partition("\n## ")[0]
    claims = [(claim, proof) for claim, proof in rows(section, 2) if claim]
    previous: list[str] = []
    for claim, proof in claims:
        found = links(proof) or (previous if proof == "the same" else [])
        assert found, f"no proof: {claim}"
        for link in found:
            path = ROOT / link.partition("#")[0]
            assert path.is_file(), link
            if path.suffix == ".py":
                assert re.search(r"^def test_", path.read_text(encoding="utf-8"), re.MULTILINE), link
        previous = found
    assert len(claims) > 10


def test_the_parity_figures_are_not_better_than_what_was_measured() -> None:
    section = README.partition("## Parity, measured")[2]
    told = [float(cells[1]) for cells in rows(section, 3) if re.match(r"\d", cells[1])]
    table = (ROOT / "docs" / "reference" / "layout-parity.md").read_text(encoding="utf-8")
    cells = re.findall(r"([\d.e-]+) / ([\d.e-]+) / ([\d.e-]+)", table)
    assert len(cells) == 13 * 3, "the README says 13 layouts and three ZeRO stages"
    measured = [max(float(cell[i]) for cell in cells) for i in range(3)]
    assert len(told) == 3
    for figure, worst in zip(told, measured, strict=True):
        assert worst <= figure <= 3 * worst


def test_the_readme_shows_commands_only_where_they_are_checked() -> None:
    _, blocks = split_fences(README)
    assert {word for word, _ in blocks} == {"console", "yaml"}
