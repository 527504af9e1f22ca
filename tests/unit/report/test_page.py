"""The page needs nothing but itself, shows what the run has and nothing else, and stays small."""

from __future__ import annotations

import base64
import json
import re
import stat
from collections.abc import Callable
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moetrain.errors import ReportError
from moetrain.report import page
from moetrain.report.facts import describe_model
from moetrain.report.metrics_table import MetricsTable, Row
from moetrain.report.page import check_target, render, write_page
from moetrain.report.run_folder import RunFolder, open_run
from moetrain.report.text_view import shown_passages, text_view
from moetrain.report.trace import RoutingTrace

MakeRun = Callable[..., RunFolder]
MakeTrace = Callable[..., RoutingTrace]
TOP_K = {"num_experts": 4, "ffn_hidden_size": 16, "router": {"type": "top_k", "top_k": 2}}
WORDS = [["", "a", " little", " text", "\n", "again"], ["", "more", " text"]]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'`\u2028\u202e\x00\ud800{{ 7*7 }}"


class Page(HTMLParser):
    """Elements as (name, attributes), text of script and other elements, in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._open = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        (self.scripts if self._open == "script" else self.words).append(data)

    @property
    def ids(self) -> set[str | None]:
        return {attributes["id"] for _, attributes in self.elements if "id" in attributes}

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


def rendered(run: RunFolder, trace: RoutingTrace | None = None) -> str:
    return render(run, trace, "No checkpoint.", "moetrain report run", 4)


def test_nothing_is_loaded_from_anywhere(make_run: MakeRun, make_trace: MakeTrace) -> None:
    html = rendered(make_run(), make_trace(WORDS))
    # The names of XML namespaces look like addresses, and are none.
    assert re.findall(r"(?:https?:)?//[a-z0-9-]+\.[^\s\"']*", html) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|\bimport\b.*from|WebSocket|sendBeacon", html)
    parsed = Page(html)
    for name, attributes in parsed.elements:
        assert not {"src", "srcset", "action", "ping"} & set(attributes), name
        assert attributes.get("href", "#")[:1] == "#"  # pyright: ignore[reportOptionalSubscript]
        assert not any(attribute.startswith("on") for attribute in attributes)
    assert {"link", "iframe", "img", "object", "embed", "base"}.isdisjoint(name for name, _ in parsed.elements)
    policy = next(a["content"] for n, a in parsed.elements if "http-equiv" in a)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def test_every_chart_has_its_place_and_its_numbers(make_run: MakeRun, make_trace: MakeTrace) -> None:
    parsed = Page(rendered(make_run(), make_trace(WORDS)))
    keys = ["loss", "grad-norm", "lr", "tokens-per-second", "load-balance", "z-loss"]
    keys += ["max-over-mean", "load-entropy", "mean-k", "threshold"]
    assert [chart["key"] for chart in parsed.data["lines"]] == keys
    assert {f"chart-{key}" for key in keys} <= parsed.ids
    assert [chart["key"] for chart in parsed.data["heats"]] == ["load-0", "load-1", "k-0", "k-1"]
    assert {"heat-load-0", "heat-load-1", "heat-k-0", "heat-k-1"} <= parsed.ids
    assert {"tokens", "controls", "typical", "chart-k-histogram", "chart-k-position", "chart-k-loss"} <= parsed.ids
    holders = [a for _, a in parsed.elements if "data-line" in a or "data-heat" in a]
    assert len(holders) == len(keys) + 4
    loss, *_ = parsed.data["lines"]
    assert [line["label"] for line in loss["lines"]] == ["training", "held-out", "unigram entropy"]
    assert loss["lines"][0]["steps"] == [1, 10, 20] and loss["lines"][0]["values"] == [2.99, 2.9, 2.8]
    assert loss["lines"][2]["values"] == [5.0, 5.0]
    mean_k = next(chart for chart in parsed.data["lines"] if chart["key"] == "mean-k")
    assert [line["label"] for line in mean_k["lines"]] == ["layer 0", "layer 1", "budget"]


def test_text_cannot_become_markup(make_run: MakeRun, make_trace: MakeTrace) -> None:
    trace = make_trace([["", HOSTILE, "x"], ["", "</script>", "<!--", "-->"]])
    html = rendered(make_run(name=f"<b>{HOSTILE[:60]}"), trace)
    parsed, harmless = Page(html), Page(rendered(make_run(), make_trace([["", "a", "x"], ["", "b", "c", "d"]])))
    assert [name for name, _ in parsed.elements] == [name for name, _ in harmless.elements]
    assert len(parsed.scripts) == 2
    assert parsed.data["text"]["texts"][1] == HOSTILE
    assert "<b></script><script>alert(1)" in "".join(parsed.words)
    assert "{{ 7*7 }}" not in harmless.scripts[0] and "49" not in parsed.data["text"]["texts"][1]
    html.encode()  # a lone surrogate must not reach the file


def test_what_a_dense_model_has_not_is_not_there(make_run: MakeRun, make_trace: MakeTrace) -> None:
    parsed = Page(rendered(make_run(moe=None), make_trace(WORDS, layers=0)))
    assert {"training", "text", "tokens", "controls"} <= parsed.ids
    assert {"load", "k", "hyper", "typical", "summaries"}.isdisjoint(parsed.ids)
    assert parsed.data["heats"] == [] and parsed.data["text"]["layers"] == []
    assert "router" not in "".join(parsed.words)


def test_a_model_of_fixed_k_without_importance_has_no_views_of_them(
    make_run: MakeRun, make_trace: MakeTrace, rows: Any
) -> None:
    lines = [rows.train(step).replace("[0, 1, 2, 1, 0]", "[0, 0, 4]") for step in (1, 2)]
    parsed = Page(rendered(make_run(lines, TOP_K), make_trace(WORDS, fixed_k=True, importance=False)))
    assert "typical" in parsed.ids
    assert {"chart-k-histogram", "chart-k-position", "chart-k-loss", "heat-k-0", "k"}.isdisjoint(parsed.ids)
    assert not parsed.data["text"]["variableK"]
    assert [layer["importance"] for layer in parsed.data["text"]["layers"]] == [None, None]


def test_an_encoder_is_not_called_a_decoder(make_run: MakeRun) -> None:
    model = make_run().config.model
    assert describe_model(model).startswith("DA-MoE decoder: ")
    assert describe_model(model.model_copy(update={"type": "encoder"})).startswith("DA-MoE encoder: ")


def test_without_a_trace_the_page_says_why(make_run: MakeRun) -> None:
    parsed = Page(rendered(make_run()))
    assert "No checkpoint." in "".join(parsed.words)
    assert parsed.data["text"] is None and "tokens" not in parsed.ids


def test_tokens_come_back_from_their_packing(make_trace: MakeTrace) -> None:
    trace = make_trace(WORDS)
    view = text_view(trace)

    def uint16(text: str) -> np.ndarray:
        return np.frombuffer(base64.b64decode(text), "<u2")

    assert view["texts"] == [word for words in WORDS for word in words]
    assert [(p["start"], p["length"]) for p in view["passages"]] == [(0, 6), (6, 3)]
    assert view["nll"][0] is None and view["nll"][6] is None
    for packed, layer in zip(view["layers"], trace.layers, strict=True):
        used = layer.expert_ids_NK >= 0
        np.testing.assert_array_equal(uint16(packed["k"]), layer.num_selected_N)
        np.testing.assert_array_equal(uint16(packed["experts"]), layer.expert_ids_NK[used])
        weights = uint16(packed["weights"]) * packed["weightScale"]
        np.testing.assert_allclose(weights, layer.weights_NK[used], atol=1e-5)
        importance = uint16(packed["importance"]) * packed["importanceScale"]
        np.testing.assert_allclose(importance, layer.importance_N, atol=1e-5)
    assert set(view["summaries"]) == {"0", "1", "all"}
    both = [sum(pair) for pair in zip(*(view["summaries"][i]["histogram"] for i in "01"), strict=True)]
    assert view["summaries"]["all"]["histogram"] == both
    for experts in view["typical"]["layers"].values():
        for tokens in experts:
            for token, times in tokens:
                assert 0 < times <= view["typical"]["tokens"][str(token)][1]


def test_a_large_run_makes_a_small_page(make_run: MakeRun, make_trace: MakeTrace) -> None:
    layers, experts, random = 32, 128, np.random.default_rng(0)
    rows = []
    for step in range(1, 601):
        values = {"train/loss": 3.0 + random.random(), "train/grad_norm": random.random(), "train/lr": 1e-3}
        lists = {}
        for layer in range(layers):
            at = f"router/layer{layer:02d}"
            for name in ("max_over_mean", "entropy", "max_entropy", "mean_k", "threshold", "hyper_norm_ratio"):
                values[f"{at}/{name}"] = 1.0 + random.random()
            lists[f"{at}/load"] = random.random(experts, dtype=np.float32)
            lists[f"{at}/k_histogram"] = random.integers(0, 99, 9).astype(np.float32)
        rows.append(Row("train", step, values, lists))
    small = make_run()
    run = RunFolder(small.path, small.config, MetricsTable(tuple(rows), 0), None, datetime.now(UTC))
    vocabulary = [f" token{i}" for i in range(2000)]
    pieces = [["", *random.choice(vocabulary, 63)] for _ in range(64)]
    trace = make_trace(pieces, layers=layers, experts=experts, max_k=8)
    html = rendered(run, trace)
    assert len(html.encode()) < 3_000_000
    assert 1 <= shown_passages(trace) < 64
    assert "Shown token by token: the first" in html
    data = Page(html).data
    assert max(len(line["steps"]) for chart in data["lines"] for line in chart["lines"]) <= 500
    assert len(data["text"]["passages"]) == shown_passages(trace)


@pytest.mark.parametrize(
    ("summary", "words"),
    [
        (None, "running, or killed: step 20 of 100"),
        ({"iteration": 20, "outcome": "finished"}, "finished at step 20 of 100"),
        (
            {"iteration": 23, "outcome": "failed", "error": "MemoryError: x"},
            "failed (MemoryError: x) at step 23 of 100",
        ),
        ({"iteration": 10, "outcome": "stopped"}, "running, or killed: step 20 of 100"),
        ("{", "running, or killed"),
    ],
)
def test_the_status_is_that_of_the_newest_process(make_run: MakeRun, summary: Any, words: str) -> None:
    run = make_run()
    if summary is not None:
        text = summary if isinstance(summary, str) else json.dumps(summary)
        (run.path / "summary.json").write_text(text)
    assert words in "".join(Page(rendered(open_run(run.path))).words)


def test_damaged_metrics_are_told(make_run: MakeRun, rows: Any) -> None:
    run = make_run([rows.train(1), "{oops", rows.train(2)])
    assert "1 damaged line(s) of metrics.jsonl are not shown" in "".join(Page(rendered(run)).words)


def test_losses_that_are_not_finite_break_the_line_and_not_the_page(make_run: MakeRun, rows: Any) -> None:
    run = make_run([rows.train(1, 3.0), rows.train(2, float("nan")), rows.train(3, float("inf"))])
    loss = Page(rendered(run)).data["lines"][0]
    assert loss["lines"][0]["values"] == [3.0, None, None]


def test_a_page_that_is_there_is_replaced_only_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "new" / "page.html"
    check_target(target, overwrite=False)
    write_page("one", target, overwrite=False)
    with pytest.raises(ReportError, match=r"is there already; --overwrite replaces it"):
        check_target(target, overwrite=False)
    with pytest.raises(ReportError, match="refusing to overwrite"):
        write_page("two", target, overwrite=False)
    assert target.read_text() == "one"
    check_target(target, overwrite=True)
    write_page("two", target, overwrite=True)
    assert target.read_text() == "two"
    assert [path.name for path in target.parent.iterdir()] == ["page.html"]


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ReportError, match="is a folder; name a file"):
        check_target(tmp_path, overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(ReportError, match="is not a folder that can be written to"):
        check_target(tmp_path / "file" / "page.html", overwrite=False)

    def full(self: Path, *args: Any, **kwargs: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ReportError, match="No space left"):
        write_page("x", tmp_path / "page.html", overwrite=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_the_page_is_readable_by_others_as_any_file_of_the_run(tmp_path: Path) -> None:
    write_page("x", tmp_path / "page.html", overwrite=False)
    (tmp_path / "plain").write_text("x")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("page.html", "plain")}
    assert len(modes) == 1


def test_assets_are_all_in_use() -> None:
    assert {path.name for path in page.ASSETS.iterdir()} == {*page.SCRIPTS, "page.css", "page.html.j2"}
