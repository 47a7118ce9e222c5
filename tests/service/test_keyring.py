"""Which keys are known, and when they are not any more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from argrad.keys import new_key, stored_line
from argrad_service.keyring import Keyring, KeysError, parse_keys

ALICE, BOB = new_key(), new_key()


def test_keys_of_settings_and_file_are_known_by_name(tmp_path: Path):
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\n{stored_line('bob', BOB)}  # since May\n")
    keyring = Keyring(stored_line("alice", ALICE).upper().replace("ALICE", "alice"), file)
    assert (keyring.owner_of(ALICE.encode()), keyring.owner_of(BOB.encode())) == ("alice", "bob")
    for unknown in (b"", new_key().encode(), ALICE.encode() + b" ", ALICE[:-1].encode()):
        assert keyring.owner_of(unknown) is None
    assert keyring.names() == ["alice", "bob"]


def test_a_name_may_have_two_keys_while_they_change_places():
    keyring = Keyring(f"{stored_line('alice', ALICE)}, {stored_line('alice', BOB)}")
    assert keyring.owner_of(ALICE.encode()) == keyring.owner_of(BOB.encode()) == "alice"


def test_a_reload_revokes_and_admits_and_what_is_wrong_changes_nothing(tmp_path: Path):
    file = tmp_path / "keys"
    file.write_text(stored_line("alice", ALICE))
    keyring = Keyring("", file)
    assert not keyring.has_changed()
    file.write_text(stored_line("bobby", BOB))
    assert keyring.has_changed()
    keyring.reload()
    assert (keyring.owner_of(ALICE.encode()), keyring.owner_of(BOB.encode())) == (None, "bobby")
    file.write_text("nonsense")
    with pytest.raises(KeysError, match="keys, line 1: found something else than name:sha256"):
        keyring.reload()
    assert not keyring.has_changed(), "one complaint a change"
    file.unlink()
    assert keyring.has_changed()
    with pytest.raises(KeysError, match=r"keys \(ARGRAD_API_KEYS_FILE\) cannot be read: No such file"):
        keyring.reload()
    assert keyring.owner_of(BOB.encode()) == "bobby"
    file.write_text("")
    keyring.reload()
    assert keyring.names() == [], "an empty file revokes all"


def test_a_file_that_is_another_is_seen_even_at_the_same_size_and_time(tmp_path: Path):
    file, other = tmp_path / "keys", tmp_path / "other"
    file.write_text(stored_line("alice", ALICE))
    keyring = Keyring("", file)
    other.write_text(stored_line("bobby", BOB))
    seen = file.stat()
    os.utime(other, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    other.replace(file)  # as a mounted secret changes
    assert keyring.has_changed()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ALICE, "found something else than name:sha256, as `argrad keys new NAME` prints it"),
        (f"alice:{ALICE}", "found something else than name:sha256"),
        ("alice:" + "0" * 63, "found something else"),
        (f"public:{'0' * 64}", "found the name 'public', which is taken"),
        (f"a:{'0' * 64},b:{'0' * 64}", "found one key with two names, a and b"),
    ],
    ids=["a key", "a key behind its name", "too short", "a name that is taken", "two names"],
)
def test_what_is_wrong_is_said_and_not_quoted(text: str, message: str):
    with pytest.raises(KeysError, match=f"here, line 2: {message}") as caught:
        parse_keys(f"\n{text}", "here")
    assert ALICE not in str(caught.value)
