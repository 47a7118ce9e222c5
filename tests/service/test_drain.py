"""When whoever is turned away is told to come back."""

from __future__ import annotations

import math

from argrad_service.scheduling.drain import Drain


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_nothing_is_known_at_first_and_a_second_is_the_least():
    assert [Drain(1, Clock()).next_place_s() for _ in range(3)] == [1, 1, 1]


def test_quick_jobs_free_many_places_a_second():
    clock = Clock()
    drain = Drain(2, clock)
    drain.begin(1, 8)
    clock.now += 0.8  # a tenth of a second a job, two threads
    drain.end(1)
    waits = [drain.next_place_s() for _ in range(60)]
    assert waits.count(1) in (19, 20)
    assert waits == sorted(waits)
    assert waits[-1] == 3


def test_the_mean_follows_what_was_measured():
    clock = Clock()
    drain = Drain(1, clock)
    for took_s in [4.0] + [10.0] * 40:
        drain.begin(1, 1)
        clock.now += took_s
        drain.end(1)
    assert drain.next_place_s() == 10


def test_nobody_waits_more_than_a_minute_and_the_line_is_forgotten_in_time():
    clock = Clock()
    drain = Drain(1, clock)
    drain.begin(1, 1)
    clock.now += 50
    assert [drain.next_place_s() for _ in range(3)] == [50, 60, 60]
    drain.end(1)
    clock.now += 1000
    assert drain.next_place_s() == 50


def test_a_minute_is_a_minute_at_any_reading_of_the_clock():
    clock = Clock()
    drain = Drain(1, clock)
    drain.begin(1, 1)
    for now in range(1, 100_000, 7):
        clock.now = 200.0 + now * math.pi
        assert drain.next_place_s() <= 60
