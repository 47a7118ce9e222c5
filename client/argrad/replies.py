"""From the tensors of a call to those of a message, and from a message to what a caller gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from argrad.errors import ProtocolError
from argrad.problems import Flag, Status
from argrad.problems.form import Blocks
from argrad.results import Report
from argrad.wire.messages import ReportDocument, TensorMap

_NUMBERS = ("iterations", "primal_residual", "dual_residual", "gap", "objective")


def named(prefix: str, tensors: Mapping[str, Tensor]) -> TensorMap:
    """Tensors under the names that a message gives them."""
    return {f"{prefix}.{name}": tensor.detach() for name, tensor in tensors.items()}


def section(tensors: TensorMap, name: str, like: Tensor) -> Blocks:
    """One object of a reply, on the device and in the dtype of the problem."""
    prefix, device, dtype = name + ".", like.device, like.dtype
    return {
        key.removeprefix(prefix): tensor if tensor.dtype == dtype and tensor.device == device else tensor.to(like)
        for key, tensor in tensors.items()
        if key.startswith(prefix)
    }


def one_each(values: str | Sequence[str] | None) -> tuple[str, ...]:
    """Words of a reply, one a problem; a problem without a batch has one word."""
    if values is None:
        return ()
    return (values,) if isinstance(values, str) else tuple(values)


def read_statuses(words: str | Sequence[str]) -> tuple[Status, ...]:
    """Verdicts of a reply.

    Raises:
        ProtocolError: one of them is not known here.
    """
    each = one_each(words)
    if each and each.count(each[0]) == len(each):  # as a rule, and a batch may be thousands
        words, repeated = each[:1], len(each)
    else:
        words, repeated = each, 1
    try:
        return tuple(Status(word) for word in words) * repeated
    except ValueError as error:
        raise _unknown(error) from None


def read_report(document: ReportDocument, tensors: TensorMap, timings_ms: dict[str, float]) -> Report:
    """Report of a reply.

    Raises:
        ProtocolError: a flag is not known here.
    """
    try:
        flags = _read_flags(document.flags)
    except ValueError as error:
        raise _unknown(error) from None
    numbers = {name.removeprefix("report."): t for name, t in tensors.items() if name.startswith("report.")}
    known = {name: numbers.pop(name, None) for name in _NUMBERS}
    return Report(
        solver=document.solver,
        method=document.method,
        method_options=document.method_options or {},
        flags=flags,
        measures=numbers,
        timings_ms=timings_ms,
        **known,
    )


def _read_flags(given: list[str] | list[list[str]]) -> tuple[tuple[Flag, ...], ...]:
    """The flags of each problem; those of one without a batch are no list of lists."""
    if not any(given):
        return ((),) * max(1, len(given))
    groups = [group for group in given if isinstance(group, list)]
    alone = [word for word in given if isinstance(word, str)]
    return tuple(tuple(Flag(word) for word in group) for group in groups or [alone])


def _unknown(error: ValueError) -> ProtocolError:
    return ProtocolError(f"the reply says what this client does not know: {error}", status_code=200)
