"""`argrad keys new`, and what a service keeps of a key."""

from __future__ import annotations

import base64
import hashlib
import re
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from argrad.cli import app
from argrad.errors import ProblemError
from argrad.keys import append_line, new_key, stored_line


def run(*arguments: str):
    return CliRunner().invoke(app, ["keys", "new", *arguments])


def test_keys_are_256_bits_and_differ() -> None:
    first, second = new_key(), new_key()
    assert first != second
    assert len(base64.urlsafe_b64decode(first.removeprefix("argrad_") + "=")) == 32


def test_the_key_is_printed_with_the_line_that_is_kept_of_it() -> None:
    result = run("alice")
    key, line = result.stdout.splitlines()
    assert re.fullmatch(r"argrad_[\w-]{43}", key)
    assert line == f"alice:{hashlib.sha256(key.encode()).hexdigest()}"
    assert "a key for alice" in result.stderr
    assert key not in result.stderr


def test_a_file_gets_the_line_and_the_screen_the_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    keys = [run(name, "--file", str(file)).stdout.strip() for name in ("alice", "bob")]
    assert file.read_text().splitlines() == [stored_line("alice", keys[0]), stored_line("bob", keys[1])]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_line_that_was_broken_off_stays_a_line_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# keys")
    append_line(file, "a:b")
    assert file.read_text() == "# keys\na:b\n"


@pytest.mark.parametrize("name", ["", "a b", "a:b", "-a", "x" * 65, "é", "a\n"])
def test_a_name_that_could_break_a_line_is_refused(name: str) -> None:
    with pytest.raises(ProblemError, match=r"NAME: found .*, wanted at most 64 letters, digits"):
        stored_line(name, new_key())


def test_wrong_arguments_end_with_2(tmp_path: Path) -> None:
    assert (run("a b").exit_code, run("a", "--file", str(tmp_path / "none" / "keys")).exit_code) == (2, 2)
