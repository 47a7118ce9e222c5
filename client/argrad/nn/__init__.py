"""Optimisation problems as layers of a network."""

from argrad.nn.qp import QPLayer

__all__ = ["QPLayer"]
