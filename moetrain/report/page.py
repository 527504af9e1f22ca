"""The page: one HTML file that needs nothing but itself."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from moetrain import __version__
from moetrain.data.atomic import staged
from moetrain.errors import DataError, ReportError
from moetrain.report.charts import (
    HeatChart,
    LineChart,
    hyper_charts,
    k_charts,
    k_heatmaps,
    load_charts,
    load_heatmaps,
    training_charts,
)
from moetrain.report.facts import details, moment, tiles
from moetrain.report.run_folder import RunFolder
from moetrain.report.text_view import text_view
from moetrain.report.trace import RoutingTrace

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("core.js", "lines.js", "heat.js", "bars.js", "tokens.js", "main.js")


@dataclass(frozen=True)
class Section:
    """Charts under one heading."""

    key: str
    title: str
    lines: Sequence[LineChart]
    heats: Sequence[HeatChart] = ()
    heat_title: str = ""


def render(run: RunFolder, trace: RoutingTrace | None, why_no_text: str, command: str, layout_size: int | None) -> str:
    """The page as HTML.

    Args:
        run: the folder.
        trace: what a checkpoint did with text; None leaves that part out, and `why_no_text` stands there.
        command: what made the page, as it was typed.
        layout_size: number of ranks that saved the checkpoint, where it is known.
    """
    sections = _sections(run)
    data: dict[str, Any] = {
        "lines": [chart.as_json() for section in sections for chart in section.lines],
        "heats": [chart.as_json() for section in sections for chart in section.heats],
        "text": text_view(trace) if trace else None,
    }
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("page.html.j2").render(
        run=run,
        tiles=tiles(run),
        details=details(run, layout_size),
        sections=sections,
        trace=trace,
        view=data["text"],
        why_no_text=why_no_text,
        command=command,
        version=__version__,
        now=moment(datetime.now(UTC)),
        style=Markup((ASSETS / "page.css").read_text(encoding="utf-8")),
        script=Markup("\n".join((ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS)),
        data=embedded_json(data),
    )
    return html.encode("utf-8", "replace").decode("utf-8")  # a path may hold bytes that are no text


def embedded_json(tree: Any) -> Markup:
    """JSON inside a script element: `<` and `&` as escapes, so that no text can end the element or begin another."""
    text = json.dumps(tree, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def check_target(path: Path, overwrite: bool) -> None:
    """Before any work. ReportError unless the page can be written there."""
    if path.is_dir():
        raise ReportError(f"--out {path} is a folder; name a file")
    if path.exists() and not overwrite:
        raise ReportError(f"--out {path} is there already; --overwrite replaces it")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ReportError(f"--out {path}: {parent} is not a folder that can be written to")


def write_page(html: str, path: Path, overwrite: bool) -> None:
    """Whole or not at all. ReportError when the disk refuses."""
    try:
        with staged(path, overwrite=overwrite) as (draft,):
            draft.write_text(html, encoding="utf-8")
    except DataError as error:
        raise ReportError(str(error)) from error


def _sections(run: RunFolder) -> list[Section]:
    """Only what this model and its metrics have."""
    table, moe = run.table, run.config.model.moe
    k_heats = k_heatmaps(table)
    k_lines = k_charts(table, moe) if k_heats else []  # a level line for a K that never changes tells nothing
    sections = [
        Section("training", "Training", training_charts(table)),
        Section("load", "Load of the experts", load_charts(table), load_heatmaps(table), "Load over steps"),
        Section("k", "Experts per token", k_lines, k_heats, "Share of tokens with each K"),
        Section("hyper", "Hyper-expert", hyper_charts(table)),
    ]
    return [section for section in sections if section.lines or section.heats]
