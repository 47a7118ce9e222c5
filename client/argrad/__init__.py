"""argrad: gradients of optimisation problems, served."""

from argrad import nn, problems
from argrad._version import __version__
from argrad.aio import AsyncClient
from argrad.client import Client
from argrad.defaults import configure
from argrad.errors import (
    ArgradError,
    AuthenticationError,
    ConnectionFailedError,
    DeadlineExceededError,
    ForkedError,
    GradientError,
    InternalServiceError,
    MissingExtraError,
    OverloadedError,
    PayloadTooLargeError,
    ProblemError,
    ProblemGoneError,
    ProtocolError,
    ServiceError,
    SolveError,
    StateGoneError,
    UnavailableError,
)
from argrad.functional import BoundedQPSolution, QPSolution, TwoSidedSolution, solve_lp, solve_qp, solve_two_sided_qp
from argrad.observation import Observation
from argrad.options import Options
from argrad.problems import QP, Flag, Status
from argrad.registered import Registered
from argrad.results import GradientResult, Point, Report, SolveResult, TangentResult
from argrad.warm import WarmStart

__all__ = [
    "QP",
    "ArgradError",
    "AsyncClient",
    "AuthenticationError",
    "BoundedQPSolution",
    "Client",
    "ConnectionFailedError",
    "DeadlineExceededError",
    "Flag",
    "ForkedError",
    "GradientError",
    "GradientResult",
    "InternalServiceError",
    "MissingExtraError",
    "Observation",
    "Options",
    "OverloadedError",
    "PayloadTooLargeError",
    "Point",
    "ProblemError",
    "ProblemGoneError",
    "ProtocolError",
    "QPSolution",
    "Registered",
    "Report",
    "ServiceError",
    "SolveError",
    "SolveResult",
    "StateGoneError",
    "Status",
    "TangentResult",
    "TwoSidedSolution",
    "UnavailableError",
    "WarmStart",
    "__version__",
    "configure",
    "nn",
    "problems",
    "solve_lp",
    "solve_qp",
    "solve_two_sided_qp",
]
