"""The code blocks of README and docs, extracted and run against a real service."""

import contextlib
import io
import json
import re
import subprocess

import pytest

import argrad
from tests.docs.markdown import ROOT, Block, blocks

DOCUMENTED_URL = "http://127.0.0.1:8000"
FILES = ("README.md", "docs/api.md")
PROGRAMS = (*FILES, "docs/layers.md", "docs/migrating-from-qpth.md")
VARYING = {"timings_ms", "state", "iterations"}


def pairs(path: str, language: str) -> list[tuple[Block, Block]]:
    """Each block of a language and the block after it, which shows what it prints."""
    found = blocks(path)
    return [(code, found[i + 1]) for i, code in enumerate(found[:-1]) if code.language == language]


@pytest.mark.parametrize("path", PROGRAMS)
def test_python_blocks_print_what_the_page_shows(path, service_url):
    """All blocks of a page are one program, run in the order of the page."""
    namespace = {"__name__": "__main__"}
    programs = [block for block in blocks(path) if block.language == "python"]
    assert programs
    shown = {code: output for code, output in pairs(path, "python") if output.language == "text"}
    try:
        for block in programs:
            printed = io.StringIO()
            source = "\n" * block.line + block.text.replace(DOCUMENTED_URL, service_url)
            with contextlib.redirect_stdout(printed):
                exec(compile(source, path, "exec"), namespace)
            if block in shown:
                assert printed.getvalue() == shown[block].text, f"{path}:{block.line}"
    finally:
        for value in namespace.values():
            client = getattr(value, "client", value)
            if isinstance(client, argrad.Client):
                client.close()


@pytest.mark.parametrize("path", FILES)
def test_curl_blocks_get_the_reply_that_the_page_shows(path, service_url):
    calls = [(code, shown) for code, shown in pairs(path, "bash") if "curl" in code.text]
    assert calls
    for code, shown in calls:
        command = code.text.replace(DOCUMENTED_URL, service_url)
        done = subprocess.run(["bash", "-euc", command], capture_output=True, text=True, check=True)
        compare(json.loads(done.stdout), json.loads(shown.text), f"{path}:{code.line}")


def compare(found, wanted, where: str) -> None:
    """Equal but for the last digits, and for what differs from run to run."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for name in wanted:
            if name not in VARYING:
                compare(found[name], wanted[name], f"{where}.{name}")
            elif isinstance(wanted[name], dict):
                assert found[name].keys() == wanted[name].keys(), f"{where}.{name}"
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for i, pair in enumerate(zip(found, wanted, strict=True)):
            compare(*pair, f"{where}[{i}]")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, abs=1e-9), where
    else:
        assert found == wanted, where


def test_the_first_gradient_takes_at_most_twelve_lines():
    first = next(block for block in blocks("README.md") if block.language == "python")
    assert len(first.text.strip().splitlines()) <= 12


@pytest.mark.parametrize("path", [*FILES, "CONTRIBUTING.md", "examples/README.md"])
def test_make_targets_that_a_page_names_exist(path):
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(
        re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)\b(?=`|\s+#| TORCH|$)", (ROOT / path).read_text(), re.MULTILINE)
    )
    assert named <= targets


@pytest.mark.parametrize(
    "path", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_of_a_page_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / path).read_text()):
        if "://" not in target:
            assert ((ROOT / path).parent / target).exists(), target
