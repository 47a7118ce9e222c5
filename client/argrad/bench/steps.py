"""One step of a caller: a solve with its gradient in one call or two, on problems drawn beforehand."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field
from typing import cast

import httpx
import torch
from pydantic import SecretStr
from torch import Tensor

from argrad.backend import Call
from argrad.bench.connection import Line
from argrad.bench.plan import Plan
from argrad.errors import StateGoneError
from argrad.replies import named, one_each
from argrad.transport.calls import HttpCalls, HttpOptions, read_reply
from argrad.transport.exchange import Answer, Pause, Send, Steps, drive_async
from argrad.transport.retries import RetryPolicy
from argrad.wire.messages import ProblemDocument, SolveReply, SolveRequest, TensorMap, VjpReply, VjpRequest

_MOST_DRAWN = 16
_MOST_DRAWN_BYTES = 64 * 1024**2
_STAGE = re.compile(r"(\w+);dur=([\d.]+)")


@dataclass(frozen=True, eq=False)
class Drawn:
    """A problem with the cotangent of its solution, as tensors of a message."""

    problem: TensorMap
    upstream: TensorMap


def draw(plan: Plan) -> list[Drawn]:
    """Random problems of the plan's size: up to 16, fewer if they are large.

    Q = UᵀU + 1e-3 I with U uniform on (0, 1); G, A and z₀ normal; h = Gz₀ + s₀ with s₀ uniform and b = Az₀.

    References:
        Amos & Kolter, OptNet, ICML 2017, footnote 4.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    lead = (plan.batch,) if plan.batch > 1 else ()
    n, m, p = plan.n, plan.m, plan.p

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*lead, *shape, dtype=torch.float64, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*lead, *shape, dtype=torch.float64, generator=generator)

    def one() -> Drawn:
        factor, z = uniform(n, n), normal(n, 1)
        parameters = {"Q": factor.mT @ factor + 1e-3 * torch.eye(n, dtype=torch.float64), "q": normal(n)}
        if m:
            G = normal(m, n)
            parameters |= {"G": G, "h": (G @ z).squeeze(-1) + uniform(m)}
        if p:
            A = normal(p, n)
            parameters |= {"A": A, "b": (A @ z).squeeze(-1)}
        upstream = normal(n).to(torch.float32 if plan.options.precision == "float32" else torch.float64)
        return Drawn(named("problem", parameters), named("upstream", {"z": upstream}))

    nbytes = 8 * plan.batch * (n + 1) * (n + m + p)
    return [one() for _ in range(max(1, min(_MOST_DRAWN, _MOST_DRAWN_BYTES // nbytes)))]


@dataclass
class Taken:
    """What a step that ended well took.

    Args:
        finished_at: When its last reply was complete, by `time.perf_counter()`.
        calls: Exchanges with the service.
        resent: Whether the state was gone, so that problem and solution went a second time.
        stages_ms: Milliseconds that the service says it spent, by stage; of all its calls.
        statuses: Of each problem, and of each gradient where that is not `ok`.
    """

    finished_at: float = 0.0
    calls: int = 0
    resent: bool = False
    stages_ms: dict[str, float] = field(default_factory=dict)
    statuses: list[str] = field(default_factory=list)

    def note(self, answer: Answer, at: float) -> None:
        """Count a reply."""
        self.finished_at = at
        self.calls += 1
        for name, ms in _STAGE.findall(answer.headers.get("server-timing", "")):
            self.stages_ms[name] = self.stages_ms.get(name, 0.0) + float(ms)


class Stepper:
    """Takes the steps of a plan, on lines that its callers bring; nothing is tried twice.

    Args:
        plan: What a step is.
        api_key: Sent as `Authorization: Bearer`.

    Raises:
        ProblemError: the address or the API key cannot be one.
    """

    def __init__(self, plan: Plan, api_key: str | None) -> None:
        key = None if api_key is None else SecretStr(api_key)
        self._calls = HttpCalls(HttpOptions(urls=[plan.url], api_key=key, policy=RetryPolicy(retries=0)))
        self._context = self._calls.addresses[0].tls()
        self._plan, self._drawn = plan, draw(plan)
        self._solve = SolveRequest(
            solver=plan.options.solver_document,
            differentiation=plan.options.differentiation_document,
            gradients=plan.gradient_form,
            keep_state=plan.step == "solve+vjp",
            precision=plan.options.precision,
        )
        self._vjp = VjpRequest(
            solver=self._solve.solver,
            differentiation=self._solve.differentiation,
            gradients=plan.gradient_form,
            precision=plan.options.precision,
        )

    def line(self) -> Line:
        """A connection of one caller."""
        return Line(self._calls.addresses[0], self._context)

    async def try_one(self) -> None:
        """Take a step on a connection of its own.

        Raises:
            ArgradError: it failed.
        """
        line = self.line()
        try:
            await self.take(0, line)
        finally:
            line.close()

    async def take(self, number: int, line: Line) -> Taken:
        """Take one step.

        Args:
            number: Says which of the problems.
            line: Where its calls go.

        Raises:
            ArgradError: a call was refused, or failed.
        """
        drawn, taken = self._drawn[number % len(self._drawn)], Taken()
        call = Call(timeout_s=self._plan.timeout_s, affinity=secrets.token_hex(8))
        sent = drawn.problem | drawn.upstream if self._plan.step == "solve+gradient" else drawn.problem
        answer = await self._exchange(self._calls.post("solve", self._solve, sent, call), line, taken)
        reply, out = read_reply(SolveReply, answer)
        taken.statuses += one_each(reply.status)
        taken.statuses += _without_gradient(reply.gradient_status)
        if self._plan.step == "solve+vjp":
            answer = await self._differentiate(drawn, reply.state, out, call, line, taken)
            taken.statuses += _without_gradient(read_reply(VjpReply, answer)[0].gradient_status)
        return taken

    async def _differentiate(
        self, drawn: Drawn, state: str | None, out: TensorMap, call: Call, line: Line, taken: Taken
    ) -> Answer:
        """The second call, as clients make it: by state token, and with problem and solution once that is gone."""
        if state is not None:
            by_state = self._vjp.model_copy(update={"state": state})
            try:
                return await self._exchange(self._calls.post("vjp", by_state, drawn.upstream, call), line, taken)
            except StateGoneError:
                taken.calls += 1
            finally:
                self._calls.release([state])
        taken.resent = True
        solution = {name: tensor for name, tensor in out.items() if _is_sent_back(name)}
        whole = self._vjp.model_copy(update={"problem": ProblemDocument()})
        tensors = drawn.problem | solution | drawn.upstream
        return await self._exchange(self._calls.post("vjp", whole, tensors, call), line, taken)

    async def _exchange(self, steps: Steps, line: Line, taken: Taken) -> Answer:
        async def perform(effect: Send | Pause) -> Answer:
            sent = cast("Send", effect)  # a policy without retries never pauses
            return await line.exchange(sent.request, sent.deadline.remaining())

        answer = await drive_async(steps, perform, (httpx.HTTPError,))
        taken.note(answer, line.answered_at)
        return answer


def _is_sent_back(name: str) -> bool:
    """All of the solution but s = h − Gz, which needs not travel."""
    return name.startswith("solution.") and name != "solution.s"


def _without_gradient(status: str | list[str] | None) -> list[str]:
    return [f"no gradient: {word}" for word in one_each(status) if word != "ok"]
