"""Sphinx with Markdown. `make docs` treats every warning as an error, so a dead link ends the build."""

from __future__ import annotations

project = "moetrain"
author = "the moetrain authors"
extensions = ["myst_parser"]
html_theme = "furo"
myst_heading_anchors = 4
exclude_patterns = ["_build"]
