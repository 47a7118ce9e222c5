"""The second half of a vjp: what it differentiates, and with whom it may be done."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch

from argrad.problems import Form, Solution
from argrad.problems.sparse import SparseForm
from argrad.wire.messages import ReportDocument, TensorMap, VjpReply, VjpRequest
from argrad_service import assembly
from argrad_service.batching.frames import Frame, Sizes
from argrad_service.batching.lots import METHODS, Lot, lot_of
from argrad_service.batching.outcomes import Assembled
from argrad_service.engine.joined import is_joinable
from argrad_service.engine.options import ShouldStop
from argrad_service.engine.outcome import Backward, Forward, Outcome
from argrad_service.kept import Kept
from argrad_service.solves import vjp
from argrad_service.working import Engine, Timings, stage

JOINED = 50_000
"""Elements of the factors of a call up to which it is differentiated together with others: their factors are copied
into one, which takes as long as it saves where they are larger."""

_BLANK = VjpReply(report=ReportDocument(solver=""))
"""What replies are copied from."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Vjp:
    """A checked vjp; called, it differentiates alone.

    Args:
        engine: Differentiates.
        device: Where to differentiate.
        request: The document.
        form: The problem.
        cotangent: What is pulled back.
        wrt: Parameters whose gradients are wanted.
        forward: What is differentiated, for whoever asks whether to go on.
        kept: The state that the call names, if it names one that is factored here.
        point: The solution that the caller brings, if no registered parameter belongs to it.
        is_by_token: Whether the call names a state.
        is_merged: Whether calls are done together at all.

    Attributes:
        part: Where the factors of a state are, and their padding; None where they cannot be joined with others'.
        lot: What the call adds to a batch; None where it goes alone.
    """

    engine: Engine
    device: torch.device
    request: VjpRequest
    form: Form
    cotangent: assembly.Cotangent
    wrt: Sequence[str]
    forward: Callable[[ShouldStop], Outcome]
    kept: Kept | None
    point: Solution | None
    is_by_token: bool
    is_merged: bool
    batch_size: int | None = field(init=False)
    part: tuple[Forward, Frame] | None = field(init=False)
    lot: Lot | None = field(init=False)

    def __post_init__(self) -> None:
        part = None if self.kept is None or not self.is_merged else _part(self.kept)
        object.__setattr__(self, "batch_size", self.form.batch_size)
        object.__setattr__(self, "part", part)
        object.__setattr__(self, "lot", self._lot_at_point() if part is None else self._lot(part[0]))

    def __call__(self, should_stop: ShouldStop, timings: Timings) -> tuple[VjpReply, TensorMap]:
        """Differentiate, and answer."""
        with stage(timings, "differentiate"):
            forward = self.forward(should_stop)
            backward = vjp(self.engine, forward, self.cotangent.canonical(forward), self.request.differentiation)
            out = self.derived(forward, backward)
            if not self.is_by_token:
                out = assembly.report_tensors(self.form, forward, backward) | out
        return self.reply(forward, backward, out, timings)

    def derived(self, forward: Outcome, backward: Backward) -> TensorMap:
        """What the reply says of derivatives."""
        gradients = assembly.gradients(self.form, forward, backward, self.request, self.wrt)
        return gradients | assembly.measured(self.form, backward)

    def reply(
        self, forward: Outcome, backward: Backward, out: TensorMap, timings: Timings
    ) -> tuple[VjpReply, TensorMap]:
        """Put the reply together."""
        reply = _BLANK.model_copy(
            update={
                "report": assembly.report(self.form, forward, backward),
                "gradient_status": assembly.gradient_status(self.form, backward),
                "timings_ms": timings,
            }
        )
        return reply, assembly.in_precision(out, self.request.precision)

    def _lot_at_point(self) -> Lot | None:
        """What the call adds where its caller brings the solution: such calls are taken over together."""
        if self.point is None or not self.is_merged or isinstance(self.form, SparseForm):
            return None
        given = self.cotangent.checked
        return lot_of(self.request, self.form.problem, given, count=self.batch_size or 1, is_plain=True)

    def _lot(self, forward: Forward) -> Lot:
        data, differentiation = forward.data, self.request.differentiation
        n, rows = data.n, data.d.shape[1]
        elements = data.B * (2 * n * n + 2 * rows * n + min(rows, n) ** 2)
        cotangents = self.cotangent.checked
        key: Hashable | None = None
        if (
            elements <= JOINED
            and differentiation.method in METHODS
            and self.form.problem.dtype == torch.float64
            and self.form.problem.device.type == "cpu"
        ):
            key = (
                "vjp",
                (differentiation.method, *sorted(differentiation.options.items())),
                tuple((name, *t.shape[:-2]) if t.ndim > 2 else (name,) for name, t in sorted(cotangents.items())),
                (forward.solver, n, data.p, rows),
            )
        width = max((t.shape[0] for t in cotangents.values() if t.ndim > 2), default=1)
        return Lot(
            key=key,
            count=data.B,
            flops=data.B * width * 6.0 * (n + rows) * n,
            nbytes=16 * elements + 64 * data.B * width * (n + rows),
        )


def _part(kept: Kept) -> tuple[Forward, Frame] | None:
    outcome = kept.forward
    sizes = Sizes.of(kept.form.problem) if isinstance(outcome, Forward | Assembled) else None
    if sizes is None:
        return None
    frame, forward = Frame(sizes, sizes), outcome
    if isinstance(outcome, Assembled):
        if len(outcome.pieces) != 1:
            return None
        frame, forward = outcome.pieces[0].frame, outcome.pieces[0].outcome
    if not isinstance(forward, Forward) or not is_joinable(forward):
        return None
    return forward, frame
