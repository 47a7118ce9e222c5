"""Mixed traffic: every call, both formats, registered problems, states, errors, callers that leave; and checks."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx
import torch
from torch import Tensor

import argrad
from argrad.nn import QPLayer

D = torch.float64
WORKERS = 4
SIZES = ((2, 2), (5, 8), (20, 20), (40, 10))


@dataclass
class Seen:
    """What all callers saw.

    Args:
        calls: By kind.
        latencies_s: Of plain solves: when each ended, and how long it took.
        wrong: Answers that were not those of the engine in this process, and replies that should not have been.
    """

    calls: Counter[str] = field(default_factory=Counter)
    latencies_s: list[tuple[float, float]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class Caller(threading.Thread):
    """One caller, who does one thing after the other, chosen by chance.

    Args:
        url: Of the service.
        seed: Of all chance.
        seen: Gets what it sees.
        stop: Ends it.
    """

    def __init__(self, url: str, seed: int, seen: Seen, stop: threading.Event) -> None:
        super().__init__(name=f"caller {seed}", daemon=True)
        self._url, self._seen, self._ends, self._seed = url, seen, stop, seed
        self._random = random.Random(seed)
        self._torch = torch.Generator().manual_seed(seed)
        self._problems = [self._draw(n, m) for n, m in SIZES]
        local = argrad.Client("local")
        self._wanted = [self._gradients(local, given) for given in self._problems]
        self._moves = [self._tangents(local, given) for given in self._problems]

    def run(self) -> None:
        """Call until told to stop."""
        kinds: list[tuple[Callable[[], None], int]] = [
            (self._solve, 8), (self._train, 6), (self._jvp, 3), (self._json, 4), (self._registered, 3),
            (self._states, 2), (self._refused, 3), (self._leave, 2), (self._cut_off, 2), (self._late, 1),
        ]  # fmt: skip
        chosen, weights = [kind for kind, _ in kinds], [weight for _, weight in kinds]
        with argrad.Client(self._url) as self._client, httpx.Client(base_url=self._url, trust_env=False) as self._http:
            while not self._ends.is_set():
                kind = self._random.choices(chosen, weights)[0]
                try:
                    kind()
                except Exception as error:
                    self._seen.wrong.append(f"{kind.__name__}: {type(error).__name__}: {error}")
                self._seen.calls[kind.__name__.removeprefix("_")] += 1

    def _draw(self, n: int, m: int) -> dict[str, Tensor]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=self._torch, dtype=D)

        root = normal(n, n)
        return {"Q": root @ root.mT + torch.eye(n, dtype=D), "q": normal(3, n), "G": normal(m, n), "h": normal(m).abs()}

    def _choose(self) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        i = self._random.randrange(len(SIZES))
        return self._problems[i], self._wanted[i]

    def _gradients(self, client: argrad.Client, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        q = given["q"].clone().requires_grad_()
        z = QPLayer(client)(**(given | {"q": q}))
        return z.detach(), torch.autograd.grad(z.square().sum(), q)[0]

    def _check(self, what: str, found: Tensor, wanted: Tensor) -> None:
        if not torch.allclose(found, wanted, rtol=1e-8, atol=1e-8):
            self._seen.wrong.append(f"{what}: off by {float((found - wanted).abs().amax()):g}")

    def _solve(self) -> None:
        given, (z, _) = self._choose()
        began = time.perf_counter()
        found = self._client.solve(argrad.QP(**given), keep_state=False).solution["z"]
        self._seen.latencies_s.append((time.monotonic(), time.perf_counter() - began))
        self._check("solve", found, z)

    def _train(self) -> None:
        given, (z, gradient) = self._choose()
        found = self._gradients(self._client, given)
        self._check("z of a step", found[0], z)
        self._check("gradient of a step", found[1], gradient)

    def _jvp(self) -> None:
        i = self._random.randrange(len(SIZES))
        self._check("jvp", self._tangents(self._client, self._problems[i]), self._moves[i])

    def _tangents(self, client: argrad.Client, given: dict[str, Tensor]) -> Tensor:
        at = client.solve(argrad.QP(**given))
        return client.jvp(at, {"q": torch.ones_like(given["q"])}).tangents["z"]

    def _json(self) -> None:
        given, (z, _) = self._choose()
        problem = {name: tensor.tolist() for name, tensor in given.items()}
        reply = self._http.post("/v1/solve", json={"problem": problem, "upstream": {"z": torch.ones_like(z).tolist()}})
        self._check("JSON", torch.tensor(reply.json()["solution"]["z"], dtype=D), z)

    def _registered(self) -> None:
        i = self._random.randrange(len(SIZES))
        given = self._problems[i]
        handle = self._client.register(Q=given["Q"], G=given["G"], h=given["h"])
        found = self._client.solve(argrad.QP(q=given["q"], **handle), keep_state=False).solution["z"]
        self._check("registered", found, self._wanted[i][0])

    def _states(self) -> None:
        """States that are dropped unused, freed by name, and used after that."""
        given, _ = self._choose()
        problem = {name: tensor.tolist() for name, tensor in given.items()}
        token = self._http.post("/v1/solve", json={"problem": problem}).json()["state"]
        if self._random.random() < 0.5:
            self._expect(self._http.delete(f"/v1/states/{token}"), 204)
            upstream = {"z": torch.ones_like(given["q"]).tolist()}
            self._expect(self._http.post("/v1/vjp", json={"state": token, "upstream": upstream}), 409)

    def _refused(self) -> None:
        bad = self._random.choice(
            [
                (b"{", {"content-type": "application/json"}, 400),
                (b'{"problem": {"q": [1], "Q": [1]}}', {"content-type": "application/json"}, 422),
                (b"x", {"content-type": "text/plain"}, 415),
                (b"\xff" * 64, {"content-type": "application/x-safetensors"}, 400),
                (b"{}", {"content-type": "application/json", "argrad-timeout-ms": "-1"}, 400),
            ]
        )
        self._expect(self._http.post("/v1/solve", content=bad[0], headers=bad[1]), bad[2])

    def _expect(self, reply: httpx.Response, status: int) -> None:
        if reply.status_code != status:
            self._seen.wrong.append(f"HTTP {reply.status_code} instead of {status}: {reply.text[:200]}")

    def _leave(self) -> None:
        """Send a whole call, and leave before its answer."""
        problem = {name: tensor.tolist() for name, tensor in self._problems[2].items()}
        body = json.dumps({"problem": problem}).encode()
        self._raw(len(body), body)

    def _cut_off(self) -> None:
        """Leave in the middle of a body."""
        self._raw(1 << 20, b"x" * self._random.randrange(1 << 18))

    def _raw(self, length: int, body: bytes) -> None:
        parts = urlsplit(self._url)
        head = f"POST /v1/solve HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Length: {length}\r\n"
        with socket.create_connection((str(parts.hostname), int(parts.port or 80)), timeout=10) as connection:
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            time.sleep(self._random.choice((0.0, 0.0, 0.003)))

    def _late(self) -> None:
        """A deadline that can hardly be kept."""
        problem = {name: tensor.tolist() for name, tensor in self._problems[2].items()}
        headers = {"argrad-timeout-ms": self._random.choice(("0.01", "1", "3"))}
        with contextlib.suppress(httpx.TransportError):
            reply = self._http.post("/v1/solve", json={"problem": problem}, headers=headers)
            if reply.status_code not in (200, 504):
                self._expect(reply, 504)
