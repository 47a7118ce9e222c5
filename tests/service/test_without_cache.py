"""A service that keeps no forward state: its callers send problem and solution again, once, and nobody asks twice."""

from __future__ import annotations

import pytest

from argrad.bench import Plan, run
from tests.service.support import make_app, serving

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("budget_bytes", "calls"),
    [
        pytest.param(0, 2.0, id="no cache: no token"),
        pytest.param(8000, 3.0, id="room for few: tokens are gone"),
    ],
)
def test_a_step_without_its_state_is_one_call_more_at_most(budget_bytes: int, calls: float):
    with serving(make_app(state_budget_bytes=budget_bytes)) as url:
        found = run(Plan(url=url, callers=8, step="solve+vjp", n=10, m=10, duration_s=1.0, warmup_s=0.2))
    assert found.steps > 0
    assert found.errors == {}
    assert found.problems == {"optimal": found.steps}
    assert 0 < found.resent <= found.steps
    if budget_bytes == 0:
        assert found.resent == found.steps
    assert found.calls_per_s <= calls * found.steps_per_s * 1.001
