"""Optimisation problems as layers of a network."""

from argrad.nn.lp import LPLayer
from argrad.nn.qp import QPLayer
from argrad.nn.quadratic import BoxQP
from argrad.nn.signals import EnergySchedule, TotalVariation, differences
from argrad.nn.simplex import SimplexProjection, Sparsemax, TopK
from argrad.nn.softmax import Softmax

__all__ = [
    "BoxQP",
    "EnergySchedule",
    "LPLayer",
    "QPLayer",
    "SimplexProjection",
    "Softmax",
    "Sparsemax",
    "TopK",
    "TotalVariation",
    "differences",
]
