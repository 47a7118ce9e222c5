"""Two real services that share nothing, and one client of both: what it registers, keeps and releases at each."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
import torch

import argrad
from tests.client.support import D, assert_close, draw
from tests.service.support import make_app, serving


@pytest.fixture
def urls() -> Iterator[list[str]]:
    first, second = (make_app(state_secret=f"{name} secret of these tests") for name in ("one", "another"))
    with serving(first) as one, serving(second) as other:
        yield [one, other]


def counts(url: str) -> dict[str, float]:
    """Samples without labels."""
    text = httpx.get(f"{url}/metrics", trust_env=False, timeout=30).text
    lines = [line.split() for line in text.splitlines() if not line.startswith("#") and "{" not in line]
    return {name: float(value) for name, value in lines}


def test_states_are_found_and_released_where_they_were_made(urls: list[str]) -> None:
    given = draw(3, batch=2, batched="q", n=5, m=4)
    with argrad.Client(urls, prefetch=False) as client:
        for i in range(30):
            leaf = (given["q"] + i / 10).requires_grad_()
            argrad.solve_qp(client, **(given | {"q": leaf})).z.square().sum().backward()
        for _ in range(20):  # what rides along
            client.solve(argrad.QP(**given), keep_state=False)
    for url in urls:
        found = counts(url)
        assert found["argrad_state_hits_total"] >= 3
        assert found["argrad_state_misses_total"] == 0
        assert found["argrad_state_entries"] == 0
    assert sum(counts(url)["argrad_state_hits_total"] for url in urls) == 30


def test_what_is_registered_gets_to_each_once_it_is_needed(urls: list[str]) -> None:
    given = draw(4, batch=None, n=6, m=5)
    q = torch.randn(40, 6, generator=torch.Generator().manual_seed(1), dtype=D)
    wanted = argrad.solve_qp(argrad.Client("local"), **(given | {"q": q})).z
    with argrad.Client(urls) as client:
        fixed = client.register(**{name: tensor for name, tensor in given.items() if name != "q"})
        found = [argrad.solve_qp(client, q=each, **fixed).z for each in q]
    assert_close(torch.stack(found), wanted, 1e-10)
    for url in urls:
        assert counts(url)["argrad_registered_entries"] == 1
    assert sum(counts(url)["argrad_registered_hits_total"] for url in urls) >= 40
