"""Fixtures of the client's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from argrad.client import Client
from tests.client.support import Recorder


@pytest.fixture
def anyio_backend() -> str:
    """Asynchronous tests run on asyncio."""
    return "asyncio"


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Problems this small gain nothing from two threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def local() -> Client:
    """The engine in this process."""
    return Client("local")


@pytest.fixture
def recorder() -> Recorder:
    """The engine in this process, which notes what it is asked."""
    return Recorder()


@pytest.fixture
def recorded(recorder: Recorder) -> Client:
    """A client of `recorder`."""
    return Client(recorder)
