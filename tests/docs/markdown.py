"""What the tests read of the project's Markdown: its code blocks and its tables."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the file where it begins."""

    language: str
    text: str
    line: int


def blocks(path: str) -> list[Block]:
    """The fenced blocks of a file, in order."""
    text = (ROOT / path).read_text()
    return [Block(m[1], m[2], text.count("\n", 0, m.start()) + 1) for m in _FENCE.finditer(text)]


def table(path: str, heading: str) -> dict[str, list[str]]:
    """The cells after the first of each row of the first table below a heading, by the first cell."""
    section = (ROOT / path).read_text().partition(f"## {heading}\n")[2]
    rows = re.search(r"(^\|.*\|\n)+", section, re.MULTILINE)[0].splitlines()[2:]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row[1:-1])] for row in rows]
    return {first.strip(" `"): rest for first, *rest in cells}
