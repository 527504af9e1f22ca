"""What the tests of the documentation read in Markdown files: prose, links, anchors, fenced blocks and tables."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

_FENCE = re.compile(r"^ *(`{3,}|~{3,})(.*)$")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$")


def pages() -> list[Path]:
    """Every Markdown file of the repository, relative to its root: those that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted(Path(name) for name in set(listed) if (ROOT / name).is_file())


def split_fences(text: str) -> tuple[str, list[tuple[str, str]]]:
    """The text outside fenced blocks, and each block as (word behind the fence, content, indented as its fence)."""
    prose: list[str] = []
    blocks: list[tuple[str, str]] = []
    fence, word, content, indent = "", "", [], 0
    for line in text.splitlines():
        found = _FENCE.match(line)
        if not fence and found:
            fence, word, content = found[1], found[2].strip(), []
            indent = len(line) - len(line.lstrip())
        elif fence and found and found[1].startswith(fence) and not found[2].strip():
            blocks.append((word, "\n".join(content)))
            fence = ""
        elif fence:
            content.append(line[indent:])
        else:
            prose.append(line)
    assert not fence, f"a block begun with {fence}{word} has no end"
    return "\n".join(prose), blocks


def links(text: str) -> list[str]:
    """Targets of the links outside code."""
    prose, _ = split_fences(text)
    return _LINK.findall(re.sub(r"`[^`]*`(?!\])", "", prose))


def anchors(text: str) -> set[str]:
    """What `#...` behind a link to this text may name, by GitHub's rule."""
    prose, _ = split_fences(text)
    seen: Counter[str] = Counter()
    found = set()
    for line in prose.splitlines():
        if heading := _HEADING.match(line):
            words = re.sub(r"[^\w\- ]", "", heading[1].lower()).replace(" ", "-")
            found.add(words if not seen[words] else f"{words}-{seen[words]}")
            seen[words] += 1
    return found


def rows(text: str, columns: int) -> Iterator[list[str]]:
    """Cells of each table row with that many columns; rules between head and body are left out."""
    for line in split_fences(text)[0].splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if line.startswith("|") and len(cells) == columns and not set(line) <= set("|-: "):
            yield cells


def console_commands(text: str) -> list[list[str]]:
    """The commands of the ```console blocks, as words; a line that ends in a backslash goes on in the next one."""
    commands = []
    for word, content in split_fences(text)[1]:
        if word == "console":
            for line in content.replace("\\\n", " ").splitlines():
                assert line.startswith("$ "), f"a console block shows commands, and each begins with '$ ': {line!r}"
                commands.append(shlex.split(line.removeprefix("$ ")))
    return commands
