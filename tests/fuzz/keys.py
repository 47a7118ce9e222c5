"""A service that asks for keys: who has one is served as ever, and whoever has none gets 401, whatever is sent."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
from random import Random

from asgi_lifespan import LifespanManager

from argrad.keys import PREFIX, stored_line
from argrad_service.http.guard import OPEN
from tests.fuzz.calls import ELSEWHERE, LIMITS, REPLIES, Answer, Call, Maker, answered, documented_by, judge, template
from tests.fuzz.tally import Tally
from tests.service.support import make_app

KEY = PREFIX + "an-owner-of-this-service-in-the-fuzz-target"
FOREIGN = PREFIX + "an-owner-of-another-service-with-its-own-key"
KEYS = stored_line("owner", KEY)
WHO = ("key", "wrong key", "no key")
MOST_HELD = 32
"""Of a key, characters that nobody may find anywhere."""

_METHODS = ("GET", "GET", "GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "\xff")
_ROUTES = (
    "/", "/docs", "/openapi.json", "/metrics", "/health/live", "/health/ready", "/health/live/", "//health/live",
    "/health/live/../../metrics", "/health/ready;x", "/HEALTH/LIVE", "/health", "/v1/solvers", "/v1/solve", "/v1/vjp",
    "/v1/jvp", "/v1/states/x", "/v1/problems/" + "0" * 64, "/nowhere", "", "*",
)  # fmt: skip


def wrong_authorization(random: Random) -> list[tuple[str, str]]:
    """Headers of somebody who has no key, and tries."""
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    at = random.randrange(len(KEY))
    one_off = KEY[:at] + chr(ord(KEY[at]) ^ 1) + KEY[at + 1 :]
    tries = (
        FOREIGN, KEY[:-1], KEY[1:], KEY + "x", KEY.upper(), KEY * 2, f"{KEY[:20]} {KEY[20:]}", one_off, digest, KEYS,
        "", PREFIX, "*", "\x00", KEY + "\x00", f"{KEY},{FOREIGN}", "é", "\udcff", "x" * 100_000, f'"{KEY}"',
    )  # fmt: skip
    if random.random() < 0.7:
        return [("authorization", random.choice(("Bearer ", "bearer ", "BEARER  ")) + random.choice(tries))]
    return random.choice(
        (
            [("authorization", KEY)],
            [("authorization", f"Basic {KEY}")],
            [("authorization", f"Bearer{KEY}")],
            [("authorization", f"Bearer\t{KEY}")],
            [("authorization", "")],
            [("proxy-authorization", f"Bearer {KEY}")],
            [("x-api-key", KEY)],
            [("cookie", f"authorization=Bearer {KEY}")],
        )
    )


def fuzz_keys(count: int, seed: int) -> Tally:
    """Send so many calls, a third each with a key, with what is none, and without."""
    return asyncio.run(_fuzz_keys(count, seed))


async def _fuzz_keys(count: int, seed: int) -> Tally:
    log, tally, random = io.StringIO(), Tally("calls with keys"), Random(seed)
    app = make_app(log, **(LIMITS | {"log_level": "debug"}), api_keys=KEYS)
    documented, types = documented_by(app)
    async with LifespanManager(app, startup_timeout=60, shutdown_timeout=60):
        while app.state.readiness.phase == "starting":
            await asyncio.sleep(0.01)
        maker = Maker(Random(seed + 1))
        with tally.timed():
            for _ in range(count):
                call, who = _make(random, maker), random.choice(WHO)
                call.headers += {"key": [("authorization", f"Bearer {KEY}")], "no key": []}.get(
                    who, wrong_authorization(random)
                )
                answer = await answered(tally, app, call)
                if answer is None:
                    continue
                tally.outcomes[f"{answer.status} with {who}"] += 1
                tally.behaviours.add((who, call.method, template(call.path)[:20], answer.status))
                if who != "key":
                    wrong = judge_stranger(call, answer, types)
                else:
                    wrong = judge(answer, _statuses(documented, call), types)
                    if answer.status == 401:
                        wrong = "a key that is refused"
                    elif wrong is None and answer.status == 200 and call.path in REPLIES:
                        wrong = maker.learn(call, answer)
                if wrong is not None:
                    tally.find(call.shown(), f"{who}: {wrong}: {answer.status} {answer.body[:500]!r}")
    for secret in (KEY[-MOST_HELD:], FOREIGN[-MOST_HELD:]):
        if secret in log.getvalue():
            tally.find(secret.encode(), "a key is in the log")
    return tally


def _make(random: Random, maker: Maker) -> Call:
    if random.random() < 0.2:
        call = Call(random.choice(_METHODS), random.choice(_ROUTES), [("host", "localhost")], b"")
    else:
        call = maker.make()
    call.headers = [(name, value) for name, value in call.headers if name != "authorization"]
    return call


def _statuses(documented: dict[tuple[str, str], set[int]], call: Call) -> set[int]:
    outside = ELSEWHERE | {200, 404, 405, 499} if call.path in _ROUTES else ELSEWHERE | {404, 405, 499}
    return documented.get((call.method, template(call.path)), set()) | outside


def judge_stranger(call: Call, answer: Answer, types: set[str]) -> str | None:
    """What is wrong with an answer to somebody without a key."""
    if KEY[-MOST_HELD:].encode() in answer.body or KEY[-MOST_HELD:] in str(answer.headers):
        return "a key is in the answer"
    if call.path not in OPEN:
        if answer.status != 401:
            return "not 401"
        if not answer.headers.get("www-authenticate", "").startswith("Bearer"):
            return "401 without WWW-Authenticate"
        return judge(answer, {401}, types)
    if call.method != "GET":
        return judge(answer, {200, 400, 401, 405}, types)
    if answer.status != 200:
        return "health is not open"
    if set(json.loads(answer.body)) != {"status"}:
        return "health says more than that"
    return None
