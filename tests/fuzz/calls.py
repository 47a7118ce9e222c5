"""The whole application, called as a server calls it: every status is documented, every error is a problem document."""

from __future__ import annotations

import asyncio
import io
import json
import time
from dataclasses import dataclass, field
from random import Random
from typing import Any

from asgi_lifespan import LifespanManager
from fastapi import FastAPI

from argrad.problems.content import digest
from argrad.wire import JSON, SAFETENSORS, compress, decode
from argrad.wire.messages import JvpReply, Message, SolveReply, VjpReply
from tests.fuzz.mutations import mutate
from tests.fuzz.seeds import TOKEN, Seed, problem, seeds
from tests.fuzz.tally import Tally
from tests.service.support import make_app

MOST_S = 20.0
"""A call that has no answer by then hangs; its deadline is far below."""

LIMITS: dict[str, Any] = {
    "max_body_bytes": 256 * 1024,
    "max_json_bytes": 64 * 1024,
    "max_reply_bytes": 1 << 20,
    "max_json_reply_bytes": 1 << 20,
    "max_work_bytes": 64 << 20,
    "state_budget_bytes": 8 << 20,
    "problem_budget_bytes": 4 << 20,
    "timeout_s": 5.0,
    "body_timeout_s": 1.0,
    "log_level": "error",
}
PATHS = {"SolveRequest": "/v1/solve", "VjpRequest": "/v1/vjp", "JvpRequest": "/v1/jvp"}
REPLIES: dict[str, type[Message]] = {"/v1/solve": SolveReply, "/v1/vjp": VjpReply, "/v1/jvp": JvpReply}
ELSEWHERE = {400, 401, 403, 429}
"""What a request may get for whose route there is no documented operation, besides 404 and 405."""

PROBLEM = "application/problem+json"
_TYPES = (
    JSON,
    SAFETENSORS,
    "application/json; charset=utf-8",
    "text/plain",
    "",
    "application/json; charset=latin-1",
    "\xff",
)
_ACCEPTS = (JSON, SAFETENSORS, "*/*", "text/html", "application/*;q=0.5", "application/json;q=2", "a;q=\xff", "")
_HOSTS = ("", "evil.example", "localhost:x", "[::1", "127.0.0.1:8000", "a@localhost", "\xff", "::" * 200, "127.1")
_FROM_PAGES = (("origin", "https://evil.example"), ("origin", "null"), ("origin", ""), ("authorization", "Bearer \xff"))
_MILLISECONDS = ("1", "0.001", "5000", "-1", "nan", "inf", "1e400", "٣", "")
_LENGTHS = ("0", "1", "7", "1000000000", "99999999999999999999", "-1", "+5", "1_0", "١", "")
_OTHERS = (
    ("PATCH", "/v1/solve"),
    ("GET", "/v1/vjp"),
    ("POST", "/v1"),
    ("GET", "/v1/solvers"),
    ("GET", "/health/ready"),
)


@dataclass
class Answer:
    """What a call got."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    starts: int = 0


@dataclass
class Call:
    """A request, in the pieces in which it arrives; `breaks` cuts it off before its end."""

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes
    pieces: int = 1
    breaks: bool = False

    def shown(self) -> bytes:
        """In words, for whoever looks into a finding."""
        head = "".join(f"{name}: {value}\r\n" for name, value in self.headers)
        return f"{self.method} {self.path}\r\n{head}\r\n".encode("utf-8", "surrogatepass") + self.body

    async def send(self, app: FastAPI) -> Answer:
        """Send it, and gather the answer."""
        size = max(1, -(-len(self.body) // self.pieces))
        chunks = [self.body[at : at + size] for at in range(0, len(self.body), size)] or [b""]
        if self.breaks:
            chunks = chunks[:-1]
        sent, forever, answer = iter(chunks), asyncio.Event(), Answer()
        left = len(chunks)

        async def receive() -> dict[str, Any]:
            nonlocal left
            for chunk in sent:
                left -= 1
                return {"type": "http.request", "body": chunk, "more_body": left > 0 or self.breaks}
            if not self.breaks:
                await forever.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                answer.status, answer.starts = message["status"], answer.starts + 1
                answer.headers = {name.decode(): value.decode("latin-1") for name, value in message["headers"]}
            else:
                answer.body += bytes(message.get("body", b""))

        raw = self.path.encode("ascii", "replace")
        headers = [(name.lower().encode(), value.encode("utf-8", "surrogatepass")) for name, value in self.headers]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": self.method, "scheme": "http",
            "path": self.path, "raw_path": raw, "query_string": b"", "root_path": "",
            "headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000), "state": {},
        }  # fmt: skip
        await app(scope, receive, send)  # type: ignore[arg-type]
        return answer


def fuzz_calls(count: int, seed: int) -> Tally:
    """Send so many calls, of mutated bodies and of headers that may be wrong, to an application of its own."""
    return asyncio.run(_fuzz_calls(count, seed))


async def _fuzz_calls(count: int, seed: int) -> Tally:
    log, tally = io.StringIO(), Tally("calls")
    app = make_app(log, **LIMITS)
    documented, types = documented_by(app)
    async with LifespanManager(app, startup_timeout=60, shutdown_timeout=60):
        while app.state.readiness.phase == "starting":
            await asyncio.sleep(0.01)
        maker = Maker(Random(seed))
        with tally.timed():
            for _ in range(count):
                call = maker.make()
                await _one(tally, app, call, maker, documented, types)
        probe = await Call("GET", "/health/ready", [("host", "localhost")], b"").send(app)
        if probe.status != 200:
            tally.find(b"ready", f"the service is not ready at the end: {probe.body!r}")
    return tally


async def _one(
    tally: Tally, app: FastAPI, call: Call, maker: Maker, documented: dict[tuple[str, str], set[int]], types: set[str]
) -> None:
    answer = await answered(tally, app, call)
    if answer is None:
        return
    tally.outcomes[str(answer.status)] += 1
    wrong = judge(answer, documented.get((call.method, template(call.path)), ELSEWHERE) | {404, 405, 499}, types)
    if wrong is None and answer.status == 200 and call.path in REPLIES:
        wrong = maker.learn(call, answer)
    if wrong is not None:
        tally.find(call.shown(), f"{wrong}: {answer.status} {answer.body[:500]!r}")
    tally.behaviours.add((call.path[:12], answer.status, _field(answer)))


async def answered(tally: Tally, app: FastAPI, call: Call) -> Answer | None:
    """Send a call and count it; None where it hangs or breaks the application, which is then noted."""
    tally.inputs += 1
    began = time.perf_counter()
    try:
        answer = await asyncio.wait_for(call.send(app), MOST_S)
    except TimeoutError:
        tally.find(call.shown(), f"no answer after {MOST_S} s")
        tally.outcomes["hang"] += 1
        return None
    except Exception as error:
        tally.find(call.shown(), f"{type(error).__name__}: {error}")
        tally.outcomes["defect"] += 1
        return None
    tally.slowest_s = max(tally.slowest_s, time.perf_counter() - began)
    return answer


def judge(answer: Answer, documented: set[int], types: set[str]) -> str | None:
    """What is wrong with an answer, whatever the call was."""
    if answer.starts != 1:
        return f"{answer.starts} replies"
    if answer.status >= 500 and answer.status not in (501, 504):
        return "a defect"
    if answer.status not in documented:
        return "a status that is not documented"
    if answer.status < 400:
        return None
    if answer.headers.get("content-type") != PROBLEM:
        return "no problem document"
    document = json.loads(answer.body)
    if not {"type", "title", "status", "detail", "request_id"} <= document.keys():
        return "a problem document without what it must have"
    if document["status"] != answer.status or document["request_id"] != answer.headers["x-request-id"]:
        return "a problem document that says otherwise than its head"
    if document["type"] not in types | {"not-found", "method-not-allowed"}:
        return "a type that is not documented"
    if answer.status == 429 and not answer.headers.get("retry-after", "").isdigit():
        return "429 without Retry-After"
    return None


def documented_by(app: FastAPI) -> tuple[dict[tuple[str, str], set[int]], set[str]]:
    """Statuses of each method and path, and types of problems, that /openapi.json has."""
    schema = app.openapi()
    statuses = {
        (method.upper(), path): {int(status) for status in operation["responses"] if status.isdigit()}
        for path, item in schema["paths"].items()
        for method, operation in item.items()
    }
    return statuses, set(schema["components"]["schemas"]["Problem"]["properties"]["type"]["enum"])


def template(path: str) -> str:
    """The path of /openapi.json that a path is an instance of."""
    for stem, name in (("/v1/states/", "{token}"), ("/v1/problems/", "{sha256}")):
        if path.startswith(stem) and "/" not in path.removeprefix(stem):
            return stem + name
    return path


def _field(answer: Answer) -> str:
    if answer.status < 400:
        return ""
    document = json.loads(answer.body or b"{}")
    return f"{document.get('type')} {document.get('field')}"


class Maker:
    """Makes calls; knows the tokens of live states, which seeds name by a token that stands for one."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._corpus = list(seeds())
        self._tokens = [TOKEN]
        given = problem()
        self._digest = digest("qp", {name: given[name] for name in ("Q", "G", "h")})

    def make(self) -> Call:
        """The next call."""
        random = self._random
        if random.random() < 0.08:
            return self._without_body()
        seed = random.choice(self._corpus)
        body, token = seed.body, random.choice(self._tokens)
        if len(token) == len(TOKEN) or seed.content_type == JSON:
            body = body.replace(TOKEN.encode(), token.encode())
        if random.random() < 0.8:
            body = mutate(random, body, seed.content_type, lambda: random.choice(self._corpus).body)
        method, path = self._where(seed)
        call = Call(method, path, self._headers(seed), body, random.choice((1, 1, 1, 3, 50)), random.random() < 0.02)
        if random.random() < 0.1:
            call.headers.append(("content-encoding", random.choice(("zstd", "identity", "gzip", "zstd, zstd"))))
            if random.random() < 0.7:
                call.body = b"".join(compress([body], len(body)))
        length = str(len(call.body)) if random.random() < 0.95 else random.choice(_LENGTHS)
        if random.random() < 0.8:
            call.headers.append(("content-length", length))
        return call

    def learn(self, call: Call, answer: Answer) -> str | None:
        """Read a reply, and keep its token; what is wrong with it, if anything."""
        content_type = answer.headers.get("content-type")
        body = answer.body
        if answer.headers.get("content-encoding") is not None:
            return None
        try:
            reply, _ = decode(REPLIES[call.path], bytearray(body), content_type, max_header_bytes=1 << 24)
        except Exception as error:
            return f"a reply that does not read: {type(error).__name__}: {error}"
        if isinstance(reply, SolveReply) and reply.state is not None:
            self._tokens = [*self._tokens[-20:], reply.state]
        return None

    def _where(self, seed: Seed) -> tuple[str, str]:
        path = PATHS.get(seed.model.__name__)
        if path is None:
            return "PUT", f"/v1/problems/{self._random.choice((self._digest, self._digest, '0' * 64, 'x', '%00'))}"
        return "POST", path

    def _headers(self, seed: Seed) -> list[tuple[str, str]]:
        random = self._random
        headers = [("host", "localhost" if random.random() < 0.97 else random.choice(_HOSTS))]
        if random.random() < 0.03:
            headers.append(random.choice(_FROM_PAGES))
        headers.append(("content-type", seed.content_type if random.random() < 0.93 else random.choice(_TYPES)))
        if random.random() < 0.3:
            headers.append(("accept", random.choice(_ACCEPTS)))
        if random.random() < 0.1:
            headers.append(("accept-encoding", random.choice(("zstd", "gzip", "zstd;q=x", "*"))))
        if random.random() < 0.1:
            headers.append(("argrad-timeout-ms", random.choice(_MILLISECONDS)))
        if random.random() < 0.1:
            headers.append(("argrad-release", random.choice((",".join(self._tokens), "," * 300, "\x00", "x"))))
        if random.random() < 0.05:
            headers.append(("x-request-id", random.choice(("mine", "a" * 129, "é", "a b"))))
        return headers

    def _without_body(self) -> Call:
        random = self._random
        method, path = random.choice(_OTHERS)
        if random.random() < 0.7:
            kind, name = random.choice((("states", random.choice(self._tokens)), ("problems", self._digest)))
            name = (
                name
                if random.random() < 0.6
                else random.choice(("x", "", "é", "\x00", "a" * 5000, "0" * 64, "..", "a/b"))
            )
            method, path = random.choice(("GET", "DELETE", "DELETE", "PUT")), f"/v1/{kind}/{name}"
        return Call(method, path, [("host", "localhost")], b"")
