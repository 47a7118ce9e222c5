"""Hypothesis: the same examples every time, and no clock on a busy machine."""

from hypothesis import settings

settings.register_profile("argrad", derandomize=True, deadline=None)
settings.load_profile("argrad")
