from __future__ import annotations

from argrad_service.state.breaker import Breaker


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_it_opens_after_failures_in_a_row_and_says_why():
    breaker = Breaker(threshold=3, clock=Clock())
    for reason in ("one", "two"):
        breaker.fail(reason)
        assert not breaker.is_open
    breaker.succeed()
    for reason in ("three", "four", "five"):
        breaker.fail(reason)
    assert breaker.is_open
    assert (breaker.counts().reason, breaker.counts().opened) == ("five", 1)


def test_it_closes_at_a_success_and_counts_the_time():
    clock = Clock()
    breaker = Breaker(threshold=1, clock=clock)
    breaker.fail("gone")
    clock.now = 5.0
    assert breaker.counts().open_s == 5.0
    breaker.fail("still")
    breaker.succeed()
    clock.now = 9.0
    assert not breaker.is_open
    assert breaker.counts().reason is None
    assert (breaker.counts().opened, breaker.counts().open_s) == (1, 5.0)
    breaker.fail("again")
    clock.now = 10.0
    assert (breaker.counts().opened, breaker.counts().open_s) == (2, 6.0)
