"""`moetrain doctor`: what is installed, what is missing, and what each piece changes."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moetrain.cli.doctor_libraries import Finding, library_findings
from moetrain.cli.doctor_machine import machine_findings

app = typer.Typer(add_completion=False)

_STYLES = {"ok": "green", "missing": "yellow", "wrong": "bold yellow"}


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """Say what is installed, what is missing, and what each piece changes.

    Leaves with 1 when something required is missing or does not fit, else with 0.
    """
    findings = [*library_findings(), *machine_findings()]
    broken = [finding.name for finding in findings if finding.required and finding.status != "ok"]
    if as_json:
        typer.echo(json.dumps({"ok": not broken, "findings": [dataclasses.asdict(f) for f in findings]}, indent=2))
    else:
        _print_table(findings)
        verdict = f"required, but missing or wrong: {', '.join(broken)}" if broken else "everything required is there"
        typer.echo(verdict)
    raise typer.Exit(1 if broken else 0)


def _print_table(findings: list[Finding]) -> None:
    console = Console(highlight=False)
    table = Table("piece", "status")
    for header in ("found", "what it changes"):
        table.add_column(header, overflow="fold")  # a path is cut into lines, never shortened
    for finding in findings:
        failed = finding.required and finding.status != "ok"
        status = Text(
            finding.status + (" (required)" if failed else ""), "bold red" if failed else _STYLES[finding.status]
        )
        # Text, not str: versions and paths may hold brackets, which rich would read as markup.
        table.add_row(Text(finding.name), status, Text(finding.found), Text(finding.effect))
    console.print(table)
