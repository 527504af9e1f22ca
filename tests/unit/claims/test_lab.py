"""A laboratory of two tiny arms, trained for real."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from moetrain.claims.counts import Counts, mean_counts, measure_counts
from moetrain.claims.findings import find, summarize
from moetrain.claims.lab import Lab
from moetrain.claims.leak import Leak
from moetrain.claims.material import Material, make_material
from moetrain.claims.page import Facts, check_target, write
from moetrain.claims.study import Arm, Claim, Comparison, Outcome, Study
from moetrain.claims.throughput import Ratio
from moetrain.config.loader import dump_yaml, load_config
from moetrain.errors import ConfigError

COUNTS = Counts({0: 1.5, 1: 2.0}, {1: (0.5, 3.0), 2: (0.5, 4.0)}, 0.2, None)
PRESET = Path(__file__).parents[3] / "configs" / "claims" / "quick.yaml"
SMALL = {"training.train_iters": 6, "training.log_interval": 2, "training.eval_iters": 2, "model.num_layers": 1}
STUDY = Study(
    "tiny",
    "Tiny",
    "no paper",
    (
        Arm("one", "k = 1", {**SMALL, "model.moe.router.top_k": 1}),
        Arm(
            "again",
            "what the first turned out to use",
            {**SMALL},
            after="one",
            derive=lambda outcome: {"model.moe.router.top_k": round(outcome.mean_k)},
        ),
    ),
    (Claim("T1", "Equal settings give equal losses.", (Comparison("again", "one", "tie", "the same"),)),),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    source = folder / "corpus.jsonl"
    texts = [f"def f{n}(x):\n    return x + {n}  # number {n}\n" * 8 for n in range(400)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    made = make_material(folder / "lab", [source], 300, show_progress=False)
    assert make_material(folder / "lab", [source], 300, show_progress=False) == made
    with pytest.raises(ConfigError, match="made from"):
        make_material(folder / "lab", [], 300, show_progress=False)
    return [
        f"data.tokenizer.path={made.tokenizer}",
        f"data.train=[{{path: {made.train}}}]",
        f"data.valid=[{{path: {made.valid}}}]",
    ]


def lab(data: list[str], folder: Path) -> Lab:
    return Lab(STUDY, [1, 2], [PRESET], data, folder)


def test_a_study_is_trained_compared_and_not_trained_twice(data: list[str], tmp_path: Path) -> None:
    heard: list[str] = []
    results = lab(data, tmp_path).train(2, heard.append)
    assert sorted(heard) == ["again, seed 1", "again, seed 2", "one, seed 1", "one, seed 2"]
    # Equal settings and seeds: the same data in the same order from the same weights, to the last bit.
    assert [run.loss for run in results["again"]] == [run.loss for run in results["one"]]
    assert results["one"][0].loss != results["one"][1].loss
    assert summarize(results["one"]).mean_k == 1.0
    (finding,) = find(STUDY, results)
    assert finding.verdict == "supported"
    page = tmp_path / "tiny.md"
    write(page, facts(), [finding], results)
    text = page.read_text(encoding="utf-8")
    for words in (
        "| T1 | Equal settings give equal losses. | **supported** |",
        "| the same | again - one | +0.0000 | +0.0000 to +0.0000 | 0 | supported |",
        "| one | k = 1 | ",
        "| tiny | grouped | 1.10 | 1.05 to 1.20 |",
        "| one | 3.0000 | 3.2500 | +0.2500 |",
        "| one | 1.5 2.0 | +0.20 | - | 1: 50%, 3.00; 2: 50%, 4.00 |",
    ):
        assert words in text, words
    pictures = [tmp_path / "tiny" / f"{name}.svg" for name in ("differences", "losses", "curves", "counts")]
    before = [picture.read_bytes() for picture in pictures]
    check_target(page)
    write(page, facts(), [finding], results)
    assert [picture.read_bytes() for picture in pictures] == before
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    assert len(stamps) == 4
    assert lab(data, tmp_path).train(1, heard.append) == results
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def facts() -> Facts:
    return Facts(
        study=STUDY,
        preset="quick",
        base=load_config([PRESET]),
        seeds=[1, 2],
        material=Material(Path("t"), Path("a"), Path("b"), 1000, 100, "some text"),
        command="moetrain claims tiny",
        machine="a machine",
        throughput={"tiny": {"grouped": Ratio(1.1, 1.05, 1.2)}},
        leak={"one": [Leak(3.0, 3.25), Leak(3.0, 3.25)]},
        counts={"one": [COUNTS, COUNTS]},
    )


def test_a_run_of_a_fixed_k_gives_all_its_tokens_that_k(data: list[str], tmp_path: Path) -> None:
    lab(data, tmp_path).train(2, lambda label: None)
    counts = measure_counts(tmp_path / "one" / "seed-1")
    assert set(counts.by_position) >= {0, 1, 2, 4, 8, 16, 32} and set(counts.by_position.values()) == {1.0}
    assert list(counts.by_k) == [1]
    share, loss = counts.by_k[1]
    assert share == 1.0 and 0 < loss < 7
    assert counts.with_own_loss is None and counts.with_next_loss is None


def test_counts_of_seeds_are_averaged_and_a_loss_by_its_tokens() -> None:
    other = Counts({0: 2.5, 1: 3.0}, {2: (0.25, 6.0), 3: (0.75, float("nan"))}, 0.4, None)
    mean = mean_counts([COUNTS, other])
    assert mean.by_position == {0: 2.0, 1: 2.5}
    # Of two runs one has k = 1, at half of its tokens; k = 2 weighs 0.5 and 0.25; no prediction was made at k = 3.
    assert mean.by_k[1] == (0.25, 3.0)
    assert mean.by_k[2] == pytest.approx((0.375, (0.5 * 4.0 + 0.25 * 6.0) / 0.75))
    assert mean.by_k[3][0] == 0.375 and math.isnan(mean.by_k[3][1])
    assert mean.with_own_loss == pytest.approx(0.3) and mean.with_next_loss is None


def test_a_page_that_is_no_report_is_not_overwritten(tmp_path: Path) -> None:
    page = tmp_path / "mine.md"
    page.write_text("# my own words\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="no report of claims"):
        check_target(page)
    with pytest.raises(ConfigError, match=r"must name a \.md file"):
        check_target(tmp_path / "report.txt")


def test_a_folder_of_other_settings_is_refused_before_anything_is_trained(data: list[str], tmp_path: Path) -> None:
    folder = Path(lab(data, tmp_path).config("one", 1, {}).run.dir)
    folder.mkdir(parents=True)
    written = load_config([PRESET], [*data, f"run.dir={folder}", "training.seed=7"])
    (folder / "config.yaml").write_text(dump_yaml(written), encoding="utf-8")
    with pytest.raises(ConfigError, match="other settings"):
        lab(data, tmp_path).check()


def test_an_illegal_arm_is_named() -> None:
    study = Study("bad", "Bad", "", (Arm("broken", "nine of eight", {"model.moe.router.top_k": 9}),), ())
    with pytest.raises(ConfigError, match=r"(?s)arm broken \(nine of eight\).*must not exceed num_experts"):
        Lab(study, [1, 2], [PRESET], [], Path("unused")).check()


def test_an_arm_may_follow_from_the_outcome_of_another() -> None:
    overrides = STUDY.arm("again").overrides({"one": Outcome(loss=3.0, mean_k=2.9)})
    assert "model.moe.router.top_k=3" in overrides
