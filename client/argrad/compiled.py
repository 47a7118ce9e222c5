"""A solve inside `torch.compile`: operators of torch.library, which a graph holds without looking inside.

    argrad::solve      parameters                                  → blocks of the solution, a ticket, a mask
    argrad::adjoint    parameters, solution, cotangents, ticket, mask → blocks of the adjoint

Outside a graph nothing here runs. An operator takes tensors, numbers and words only: so a client goes in by its handle,
options by their text, and what autograd keeps on a record between forward and backward is in two tensors, the *ticket*,
with the state token and what the log calls the solve, and the mask of the problems that failed. Gradients are formed
from the adjoint in the graph, whatever `gradients` says. First derivatives only, as everywhere in compiled graphs.
"""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import orjson
import torch
from torch import Tensor

from argrad import operations
from argrad.autograd import solved
from argrad.backend import Call
from argrad.client import Client
from argrad.derivatives import Adjoint, without_empty
from argrad.handles import look_up
from argrad.options import OnFailure, Options, check_choices
from argrad.problems.form import Blocks
from argrad.problems.formed import DIMENSIONS_BY_KIND, form_gradients
from argrad.recorded import ADJOINT_NAMES, Kind, Recorded, State, block_names
from argrad.warm import WarmStart

TICKET_BYTES = 512
"""Length of a ticket: JSON, filled up with spaces."""

_SETTINGS = "str client, str kind, str names, str learned, str options, str on_failure, float? timeout_s"


def solve_in_graph(
    client: Client,
    kind: Kind,
    parameters: Blocks,
    *,
    options: Options,
    on_failure: OnFailure,
    timeout_s: float | None,
    request_id: str | None,
    start: WarmStart | None,
) -> Blocks:
    """`differentiable_solve` for code that `torch.compile` traces.

    Args:
        client: Who is asked.
        kind: `qp` or `qp_two_sided`.
        parameters: Those that are given, by name.
        options: Solver and differentiation method.
        on_failure: See `argrad.solve_qp`.
        timeout_s: See there.
        request_id: See there.
        start: Where the solver begins.

    Returns:
        The blocks of the solution by name.
    """
    tensors = list(parameters.values())
    learned = [name for name, tensor in parameters.items() if torch.is_grad_enabled() and tensor.requires_grad]
    settings = (client.handle, kind, ",".join(parameters), ",".join(learned), options.text, on_failure, timeout_s)
    out = torch.ops.argrad.solve(tensors, *settings, request_id, None if start is None else start.handle)
    return dict(zip(block_names(kind, tuple(parameters)), out[:-2], strict=True))


def _record(settings: Sequence[Any], call: Call) -> Recorded:
    handle, kind, names, learned, options, on_failure, _ = settings
    check_choices(on_failure, "adjoint")
    return Recorded(
        client=look_up(handle, Client),
        kind=kind,
        names=tuple(names.split(",")),
        options=Options.from_text(options),
        gradients="adjoint",
        on_failure=on_failure,
        call=call,
        learned=frozenset(filter(None, learned.split(","))),
    )


@torch.library.custom_op(
    "argrad::solve",
    mutates_args=(),
    schema=f"(Tensor[] parameters, {_SETTINGS}, str? request_id, str? start) -> Tensor[]",
)
def _solve(parameters: Sequence[Tensor], *settings_and_more: Any) -> list[Tensor]:
    *settings, request_id, start = settings_and_more
    record = _record(settings, Call())
    record.start = None if start is None else look_up(start, WarmStart)
    record.call = operations.call_within(record.client.timeout_s, settings[-1], request_id or secrets.token_hex(8))
    blocks = solved(record, *parameters)
    mask = record.unusable(parameters)
    size = _batch_size(record.kind, record.names, parameters)
    failed = torch.zeros(size or 1, dtype=torch.bool) if mask is None else mask.cpu().reshape(-1)
    # In C order, as the fake operator says.
    return [*(block.contiguous() for block in blocks), _ticket(record), failed]


def _ticket(record: Recorded) -> Tensor:
    """What the backward pass must know; the state is let go with the memory of the tensor."""
    state, call = record.state, record.call
    token = None if state is None else state.token
    text = orjson.dumps({"state": token, "request_id": call.request_id, "affinity": call.affinity})
    if len(text) > TICKET_BYTES:  # another backend's own token: the backward pass sends problem and solution
        state, text = None, orjson.dumps({"state": None, "request_id": call.request_id, "affinity": call.affinity})
    tensor = torch.frombuffer(bytearray(text.ljust(TICKET_BYTES)), dtype=torch.uint8).clone()
    if state is not None:
        weakref.finalize(tensor.untyped_storage(), _let_go, state).atexit = False
    return tensor


def _let_go(state: State) -> None:
    """Hold a state until this is called; its own finaliser does the rest."""


@torch.library.custom_op(
    "argrad::adjoint",
    mutates_args=(),
    schema=f"(Tensor[] parameters, Tensor[] solution, Tensor?[] cotangents, Tensor ticket, Tensor failed, {_SETTINGS})"
    " -> Tensor[]",
)
def _adjoint(
    parameters: Sequence[Tensor],
    solution: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    ticket: Tensor,
    failed: Tensor,
    *settings: Any,
) -> list[Tensor]:
    known = orjson.loads(ticket.numpy().tobytes())
    call = Call(request_id=known["request_id"], affinity=known["affinity"])
    record = _record(settings, call)
    timeout_s = record.client.timeout_s if settings[-1] is None else settings[-1]
    record.call = replace(call, timeout_s=timeout_s)
    record.failed = tuple(failed.nonzero().flatten().tolist())
    record.batched = record.find_batched(parameters)
    # Borrowed: the ticket owns it.
    record.state = None if known["state"] is None else cast("State", _Borrowed(known["state"]))
    # A graph gives zeros for outputs that nobody used, where multipliers may have no derivative.
    used = [None if given is None or not bool(given.any()) else given for given in cotangents]
    if all(given is None for given in used):
        used = [given if i == 0 else None for i, given in enumerate(cotangents)]
    if all(given is None for given in used):
        return [torch.zeros_like(block).contiguous() for block in record.off_slack(solution)]
    adjoint = Adjoint.forward(record, *parameters, *solution, *used)
    return [block.contiguous() for block in adjoint]


class _Borrowed:
    """A state that someone else lets go."""

    def __init__(self, token: str) -> None:
        self.token = token


def _batch_size(kind: str, names: Sequence[str], parameters: Sequence[Tensor]) -> int | None:
    dimensions = DIMENSIONS_BY_KIND[kind]
    pairs = zip(names, parameters, strict=True)
    return next((tensor.shape[0] for name, tensor in pairs if tensor.ndim > len(dimensions[name])), None)


@_solve.register_fake
def _(parameters: Sequence[Tensor], *settings: Any) -> list[Tensor]:
    kind, names = settings[1], settings[2].split(",")
    shapes = {name: tensor.shape for name, tensor in zip(names, parameters, strict=True)}
    n = shapes["q"][-1]
    rows = {"nu": shapes.get("b", (0,))[-1], "lam": shapes.get("h", (0,))[-1]}
    rows["y"] = next((shapes[name][-2 if name == "A" else -1] for name in ("l", "u", "A") if name in shapes), 0)
    rows["s"] = rows["lam"]
    batch = _batch_size(kind, names, parameters)
    lead = () if batch is None else (batch,)
    like = parameters[0]
    blocks = [like.new_empty(*lead, rows.get(name, n)) for name in block_names(kind, names)]
    ticket = torch.empty(TICKET_BYTES, dtype=torch.uint8, device="cpu")
    failed = torch.empty(1 if batch is None else batch, dtype=torch.bool, device="cpu")
    return [*blocks, ticket, failed]


@_adjoint.register_fake
def _(_parameters: Sequence[Tensor], solution: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    names = block_names(rest[4], rest[5].split(","))
    return [torch.empty_like(block) for name, block in zip(names, solution, strict=True) if name != "s"]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    parameters, *ctx.settings = inputs[:-2]
    ctx.count = len(parameters)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*parameters, *output)


def _pull_back(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    kind, names = ctx.settings[1], tuple(ctx.settings[2].split(","))
    parameters, (*solution, ticket, failed) = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
    nothing = (None,) * (len(ctx.settings) + 2)
    pulling = without_empty(grads[:-2])
    if all(given is None for given in pulling):
        return [None] * ctx.count, *nothing
    adjoint = torch.ops.argrad.adjoint(parameters, solution, pulling, ticket, failed, *ctx.settings)
    named = _gradients(kind, names, parameters, solution, adjoint, ctx.needs_input_grad[0])
    return [named.get(name) for name in names], *nothing


def _gradients(
    kind: Kind,
    names: Sequence[str],
    parameters: Sequence[Tensor],
    solution: Sequence[Tensor],
    adjoint: Sequence[Tensor],
    needed: Sequence[bool],
) -> Mapping[str, Tensor]:
    blocks = block_names(kind, names)
    ranks = {name: len(dimensions) for name, dimensions in DIMENSIONS_BY_KIND[kind].items()}
    return form_gradients(
        kind,
        dict(zip(blocks, solution, strict=True)),
        dict(zip([ADJOINT_NAMES[name] for name in blocks if name in ADJOINT_NAMES], adjoint, strict=True)),
        wrt=tuple(name for name, is_needed in zip(names, needed, strict=True) if is_needed),
        batched=[name for name, tensor in zip(names, parameters, strict=True) if tensor.ndim > ranks[name]],
    )


_solve.register_autograd(_pull_back, setup_context=_keep)
