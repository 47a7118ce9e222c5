"""Solving the problems of several callers as one batch, and one caller's in several: frames, keys and costs."""
