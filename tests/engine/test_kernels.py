"""What surrounds the compiled kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from argrad_service.engine import kernels


@pytest.fixture(autouse=True)
def solver() -> None:
    """Nothing here is solved: once is enough."""


def test_a_change_in_any_kernel_empties_the_cache_of_all(tmp_path: Path) -> None:
    (tmp_path / "called.py").write_text("one = 1\n")
    compiled = tmp_path / "__pycache__" / "caller.nbi"
    compiled.parent.mkdir()

    compiled.write_bytes(b"of an unknown past")
    kernels._drop_stale(tmp_path)
    assert not compiled.exists()

    compiled.write_bytes(b"of these sources")
    kernels._drop_stale(tmp_path)
    assert compiled.exists()

    (tmp_path / "called.py").write_text("one = 2\n")
    kernels._drop_stale(tmp_path)
    assert not compiled.exists()
