"""The tables of docs/solvers.md that follow from the code: who solves what, and what `auto` takes.

`python -m argrad_service.capabilities docs/solvers.md` writes them into the page, between their marks.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from argrad_service import engine
from argrad_service.engine.crossovers import ROWS, Row
from argrad_service.engine.registry import METHODS, SOLVERS

CHECKED_OUT = Path("docs/solvers.md")


def replace_section(page: str, name: str, content: str) -> str:
    """The page with what stands between the marks of a section replaced.

    Args:
        page: Markdown with `<!-- name -->` and `<!-- end of name -->`, each on a line of its own.
        name: Of the section.
        content: Markdown.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"the page has no section {name}")
    return f"{before}{begin}\n{content.strip()}\n\n{end}{after}"


def render(page: str) -> str:
    """docs/solvers.md with its generated tables as the code has them."""
    page = replace_section(page, "capabilities", capabilities())
    page = replace_section(page, "methods", methods())
    return replace_section(page, "choice", choice())


def capabilities() -> str:
    """Solvers × kinds × devices × methods × packages."""
    rows = [_capability(entry) for entry in engine.solvers()]
    names = ("solver", "problems", "runs on", "methods, the first by `auto`", "warm start", "packages", "extra")
    return _table(names, rows)


def methods() -> str:
    """Methods × kinds × modes."""
    rows = [
        (
            f"[`{method.name}`](methods/{method.name}.md)",
            _words(method.kinds),
            "both" if method.has_jvp else "reverse",
            "yes" if method.takes_points else "no",
            ", ".join(f"`{solver.name}`" for solver in SOLVERS.values() if method.name in solver.methods),
        )
        for method in METHODS.values()
    ]
    return _table(("method", "problems", "modes", "at a caller's point", "solvers"), rows)


def choice() -> str:
    """What `auto` takes, in the order in which it looks."""
    return _table(("problems", "where", "solver"), [(row.kind, _bounds(row), f"`{row.solver}`") for row in ROWS])


def _capability(entry: dict[str, Any]) -> tuple[str, ...]:
    name, sparse = str(entry["name"]), entry.get("sparse", {})
    kinds = list(dict.fromkeys([*entry["problems"], *sparse.get("problems", [])]))
    solver = SOLVERS.get(name)
    needs, extra = (solver.packages, solver.extra) if solver else ((engine.SPARSE_PACKAGE,), "service")
    return (
        f"`{name}`",
        _words(kinds),
        ", ".join({"cpu": "CPU", "cuda": "CUDA"}[device] for device in entry["devices"]),
        ", ".join(f"`{method['name']}`" for method in entry["methods"]),
        "yes" if entry["warm_starts"] else "no",
        ", ".join(f"`{package}`" for package in needs) or "none",
        f"`{extra}`" if needs else "none",
    )


def _words(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _bounds(row: Row) -> str:
    said = [
        "on CUDA and on the CPU" if row.device is None else {"cpu": "on the CPU", "cuda": "on CUDA"}[row.device],
        f"n ≥ {row.least_n}" if row.least_n else "",
        "" if row.most_n is None else f"n ≤ {row.most_n}",
        "" if row.most_rows is None else f"m ≤ {row.most_rows:g} (n − p)",
        f"at least {row.least_batch} problems" if row.least_batch else "",
        "" if row.most_batch is None else f"at most {row.most_batch} problems",
        "Q diagonal, all rows bounds but for at most sixteen" if row.is_diagonal else "",
    ]
    return ", ".join(part for part in said if part)


def _table(names: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [names, ("---",) * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else CHECKED_OUT
    target.write_text(render(target.read_text()))
