"""What surrounds the compiled kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from threadpoolctl import threadpool_info

from argrad.problems import QP
from argrad_service import engine
from argrad_service.engine import kernels
from argrad_service.engine.kernels import batch as compiled


@pytest.fixture(autouse=True)
def solver() -> None:
    """Nothing here is solved: once is enough."""


def test_a_change_in_any_kernel_empties_the_cache_of_all(tmp_path: Path) -> None:
    kernel, other = tmp_path / "called.py", tmp_path / "beside.py"
    kernel.write_text('"""A kernel."""\nfrom numba import njit\none = 1\n')
    other.write_text("two = 1\n")
    compiled = tmp_path / "__pycache__" / "caller.nbi"
    compiled.parent.mkdir()

    compiled.write_bytes(b"of an unknown past")
    kernels._drop_stale(tmp_path)
    assert not compiled.exists()

    compiled.write_bytes(b"of these sources")
    kernels._drop_stale(tmp_path)
    assert compiled.exists()

    other.write_text("two = 2\n")
    kernels._drop_stale(tmp_path)
    assert compiled.exists()

    kernel.write_text('"""A kernel."""\nfrom numba import njit\none = 2\n')
    kernels._drop_stale(tmp_path)
    assert not compiled.exists()


@pytest.mark.parametrize("of", [None, 16])
def test_no_second_blas_thread_is_waited_for(monkeypatch: pytest.MonkeyPatch, of: int | None) -> None:
    """On busy cores a second thread takes milliseconds to wake, and the problem alone half of one."""
    threads: list[int] = []
    for name in ("factor_hessian", "whiten", "full_gram", "solve_range"):
        kernel = getattr(compiled, name)

        def spied(*arguments: Any, kernel: Any = kernel) -> Any:
            threads.extend(each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas")
            return kernel(*arguments)

        monkeypatch.setattr(compiled, name, spied)
    n, generator = 40, torch.Generator().manual_seed(0)
    q = torch.randn(*(() if of is None else (of,)), n, dtype=torch.float64, generator=generator)
    G = torch.randn(n, n, dtype=torch.float64, generator=generator)
    engine.solve(QP(Q=torch.eye(n, dtype=torch.float64), q=q, G=G, h=torch.ones(n, dtype=torch.float64)))
    assert len(threads) >= 4
    assert set(threads) == {1}
