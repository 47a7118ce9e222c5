"""Fixtures of the drop-ins' tests: nothing is configured, and the environment says nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import argrad


@pytest.fixture(autouse=True)
def unconfigured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("ARGRAD_URL", "ARGRAD_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    argrad.configure()
    yield
    argrad.configure()


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Problems this small gain nothing from two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
