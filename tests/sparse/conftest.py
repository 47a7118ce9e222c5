"""What the tests of sparse problems share."""

import pytest

import argrad


@pytest.fixture(scope="module")
def local():
    with argrad.Client("local") as client:
        yield client


@pytest.fixture(scope="module", params=["local", "http"])
def client(request):
    """The engine in this process, and a service."""
    target = "local" if request.param == "local" else request.getfixturevalue("service_url")
    with argrad.Client(target) as client:
        yield client
