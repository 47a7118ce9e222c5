"""What is to be measured: the load, the problems, and the steps that are taken with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from argrad.arguments import LOCAL
from argrad.errors import ProblemError
from argrad.options import Options
from argrad.problems import check_names
from argrad.transport.address import parse_address
from argrad.wire.messages import Gradients, Precision

StepKind = Literal["solve", "solve+gradient", "solve+vjp"]
"""The solution alone; with its gradient in one call; or the gradient in a second call, as a training step does it."""

MOST_CONNECTIONS = 512
"""A process has a thousand files as a rule, and `select` knows no more."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A load on a service.

    Args:
        url: Of the service.
        callers: Closed loop: so many callers, each of which begins a step when its last one is over.
        rate: Open loop instead: steps begin at random (Poisson) at so many a second, whether others are over or not.
        in_flight: Open loop: most steps at once; those beyond wait here, and their latency says so.
        duration_s: Seconds that are measured,
        warmup_s: after so many seconds of the same load.
        timeout_s: Seconds that a step may take.
        n: Variables of a problem.
        m: Inequalities.
        p: Equalities.
        batch: Problems of a call; one goes without a batch dimension.
        step: What a step is.
        options: Solver, method and precision.
        gradients: In which form gradients come back; None, the adjoint, from which a client forms them.
        seed: Of problems and arrivals.

    Raises:
        ProblemError: a value is out of range, or two do not go together.
    """

    url: str
    callers: int | None = None
    rate: float | None = None
    in_flight: int = 256
    duration_s: float = 10.0
    warmup_s: float = 2.0
    timeout_s: float = 60.0
    n: int = 10
    m: int = 10
    p: int = 0
    batch: int = 1
    step: StepKind = "solve+gradient"
    options: Options = field(default_factory=Options)
    gradients: Gradients | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.url == LOCAL:
            raise ProblemError("--url", repr(self.url), "the address of a service: what is measured is the service")
        parse_address(self.url)
        if (self.callers is None) == (self.rate is None):
            raise ProblemError("--callers, --rate", "both or neither", "one of them")
        self._check_range("--callers", self.callers, 1, MOST_CONNECTIONS)
        self._check_range("--in-flight", self.in_flight, 1, MOST_CONNECTIONS)
        self._check_above_zero("--rate", self.rate)
        self._check_above_zero("--duration", self.duration_s)
        self._check_above_zero("--timeout-s", self.timeout_s)
        if not 0.0 <= self.warmup_s < float("inf"):
            raise ProblemError("--warmup", f"{self.warmup_s:g}", "seconds, 0 or more")
        self._check_range("--n", self.n, 1, None)
        self._check_range("--m", self.m, 0, None)
        self._check_range("--batch", self.batch, 1, None)
        self._check_range("--seed", self.seed, 0, 2**32 - 1)
        if not 0 <= self.p <= self.n:
            raise ProblemError("--p", str(self.p), f"0 to {self.n}: no more equalities than variables")
        check_names("--step", [self.step], get_args(StepKind))
        if self.gradients is not None:
            check_names("--gradients", [self.gradients], get_args(Gradients))
            if self.step == "solve":
                raise ProblemError("--gradients", repr(self.gradients), "nothing, as --step solve asks for none")

    @property
    def connections(self) -> int:
        """Most that are open at once."""
        return self.in_flight if self.callers is None else self.callers

    @property
    def gradient_form(self) -> Gradients:
        """The form in which gradients come back."""
        return self.gradients or "adjoint"

    @staticmethod
    def _check_range(name: str, value: int | None, least: int, most: int | None) -> None:
        if value is not None and not least <= value <= (value if most is None else most):
            raise ProblemError(name, str(value), f"{least} or more" if most is None else f"{least} to {most}")

    @staticmethod
    def _check_above_zero(name: str, value: float | None) -> None:
        if value is not None and not 0.0 < value < float("inf"):
            raise ProblemError(name, f"{value:g}", "a finite number above 0")


def options_of(solver: str, method: str, precision: str) -> Options:
    """Options of the calls.

    Raises:
        ProblemError: there is no such precision.
    """
    check_names("--precision", [precision], get_args(Precision))
    chosen: Precision = "float32" if precision == "float32" else "float64"
    return Options(solver=solver, method=method, precision=chosen)
