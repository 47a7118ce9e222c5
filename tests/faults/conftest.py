"""Fixtures of the fault tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.proxy import FaultProxy


@pytest.fixture
def anyio_backend() -> str:
    """Asynchronous tests run on asyncio."""
    return "asyncio"


@pytest.fixture
def proxy(service_url: str) -> Iterator[FaultProxy]:
    """A proxy before the service that the whole run shares."""
    with FaultProxy(service_url) as proxy:
        yield proxy
