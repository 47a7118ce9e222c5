"""Every setting of the service: an `ARGRAD_*` variable, a flag of `argrad serve`, and a row of the documentation.

`python -m argrad_service.settings` prints docs/configuration.md.
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ByteSize, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from pydantic_settings import SettingsError as UnreadableError

from argrad.errors import ArgradError
from argrad_service.admission import Limits
from argrad_service.keyring import parse_keys
from argrad_service.scheduling import Budget

PREFIX = "ARGRAD_"
_MIB = 1024**2
_GIB = 1024**3
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?|[0-9A-Fa-f.]*:[0-9A-Fa-f:.]+")
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.-]+(:\d+)?|https?://\[[0-9a-f:]+\](:\d+)?")

_Bytes = Annotated[ByteSize, Field(ge=1)]
_Count = Annotated[int, Field(ge=1)]


def _split(value: Any) -> Any:
    return tuple(filter(None, (part.strip() for part in value.split(",")))) if isinstance(value, str) else value


_Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
_Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SettingsError(ArgradError, ValueError):
    """A setting has a value that it cannot have; the message names the variable and the value."""


class Settings(BaseSettings):
    """What an operator may choose; read once, when the application is built."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    host: str = Field(
        "127.0.0.1",
        description="Address to listen on. Another than loopback needs API keys, or `--insecure`.",
    )
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 takes a free one and prints it.")
    uds: Path | None = Field(
        None, description="Path of a unix socket to listen on instead of TCP; created with mode 0600."
    )

    api_keys: SecretStr = Field(
        SecretStr(""),
        description="Who may call: entries `name:sha256`, separated by commas, as `argrad keys new NAME` prints them. "
        "Without any, and without a file of them, nobody is asked for a key.",
    )
    api_keys_file: Path | None = Field(
        None, description="File of such entries, one a line; read again when it changes, and at SIGHUP."
    )
    insecure: bool = Field(
        False,
        description="Whether the service may listen on other addresses than loopback without API keys: whoever reaches "
        "it can use it.",
    )
    allowed_hosts: _Words = Field(
        (),
        description="Names, separated by commas, that a request's Host may have, besides localhost and loopback "
        "addresses. If none is given, these alone may on loopback without keys, and every name elsewhere.",
    )
    cors_origins: _Words = Field(
        (),
        description="Origins of web pages whose scripts may call, separated by commas, such as "
        "`https://example.org`; `*` is every page, and needs keys.",
    )
    metrics_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="Further TCP port, at the same address, that has `/metrics` and health and asks for no key.",
    )
    rate_limit_per_minute: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="Calls a minute that each key may make, as many of them at once as a minute brings; above it 429. "
        "0 is no limit; without keys all callers count as one.",
    )

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where problems are solved; `auto` is `cuda` where there is a GPU."
    )
    torch_threads: int = Field(
        0,
        ge=0,
        description="Threads of one solve, in torch and in the compiled kernels; 0 is as torch chooses: the cores that "
        "the process may run on, or OMP_NUM_THREADS.",
    )
    workers: int = Field(
        1,
        ge=1,
        le=256,
        description="Processes that serve the address together; more than one needs `--redis-url`. They divide "
        "counts, budgets and threads among them. They have no affinity: replicas are the better way.",
    )
    solver_threads: _Count = Field(
        1, description="Calls that are solved at the same time. One call already uses every thread."
    )

    batching: bool = Field(
        True,
        description="Whether calls that wait for the solver are solved together, as far as their problems are alike.",
    )
    batch_flops: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        1e8,
        description="Most floating-point operations of one Newton step of a batch, padding included; a single call of "
        "more than 8 times as many is solved in slices.",
    )
    batch_bytes: _Bytes = Field(
        ByteSize(_GIB),
        description="Most memory of the solver for one batch, estimated as for the largest call; a single call "
        "that needs more is solved in slices.",
    )

    max_body_bytes: _Bytes = Field(
        ByteSize(512 * _MIB), description="Largest request body, before and after decompression; above it 413."
    )
    max_json_bytes: _Bytes = Field(
        ByteSize(2 * _MIB),
        description="Largest JSON request body, likewise; above it 413, use the binary form. JSON is parsed under "
        "Python's global lock: a large value lets other requests wait.",
    )
    max_json_numbers: _Count = Field(524_288, description="Most numbers in a JSON request body; above it 413.")
    max_json_depth: int = Field(
        64,
        ge=8,
        le=1000,
        description="Most brackets and braces of a JSON request body that are open at once; above it 413.",
    )
    max_reply_bytes: _Bytes = Field(
        ByteSize(512 * _MIB), description="Largest reply, computed from shapes before anything is solved; above it 413."
    )
    max_json_reply_bytes: _Bytes = Field(
        ByteSize(8 * _MIB), description="The same for a JSON reply, at 25 bytes a number."
    )
    max_work_bytes: _Bytes = Field(
        ByteSize(8 * _GIB),
        description="Largest estimate of the solver's memory for one call, from batch size, variables and "
        "constraints; above it 413.",
    )
    max_variables: _Count = Field(20_000, description="Most variables n of one problem; above it 413.")
    max_constraints: _Count = Field(
        100_000, description="Most rows m + p of one problem, bounds included; above it 413."
    )
    max_batch: _Count = Field(1_000_000, description="Most problems B of one call; above it 413.")
    max_cotangents: _Count = Field(4096, description="Most cotangents k of one vjp; above it 413.")
    max_iterations: int = Field(
        10_000,
        ge=100,
        le=10_000,
        description="Largest `solver.max_iterations` that a caller may ask for, at least its default of 100; above it "
        "422.",
    )

    max_queue: _Count = Field(128, description="Calls that may wait for the solver; above it 429.")
    max_pending: _Count = Field(
        512,
        description="Calls that may be in the house at once, those still sending their body included; above it 429.",
    )
    max_pending_bytes: _Bytes = Field(
        ByteSize(2 * _GIB), description="Request bodies, decompressed, that may be in memory at once; above it 429."
    )

    timeout_s: _Seconds = Field(
        300.0, description="Seconds that a call may take, after which 504; `Argrad-Timeout-Ms` can only shorten it."
    )
    header_timeout_s: _Seconds = Field(
        10.0, description="Seconds that the head of a request may take, after which its connection is closed."
    )
    body_timeout_s: _Seconds = Field(60.0, description="Seconds that a request body may take, after which 408.")
    reply_timeout_s: _Seconds = Field(
        60.0, description="Seconds that a caller may take to receive a reply, after which its connection is broken."
    )
    max_connections: _Count = Field(
        4096,
        description="Connections that may be open; above it the one that has waited longest for a request is closed, "
        "or, where all are busy, the new one, with 429.",
    )
    drain_delay_s: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds between readiness turning false at SIGTERM and the end of admission: as long as the load "
        "balancer in front needs to see it.",
    )
    keep_alive_s: _Count = Field(120, description="Seconds for which an idle connection is kept.")
    shutdown_timeout_s: _Count = Field(
        30,
        description="Seconds that calls under way have to finish after the end of admission; those that have not are "
        "handed back with 503. A second signal ends at once.",
    )

    state_budget_bytes: Annotated[ByteSize, Field(ge=0)] = Field(
        ByteSize(_GIB),
        description="Memory for forward state; the least recently used goes first. A lost state costs its caller one "
        "factorisation, never an answer.",
    )
    state_ttl_s: _Seconds = Field(900.0, description="Seconds after its last use for which forward state is kept.")
    problem_budget_bytes: Annotated[ByteSize, Field(ge=0)] = Field(
        ByteSize(_GIB),
        description="Memory for registered problems and what solving them leaves for the next time; the least recently "
        "used goes first. A lost one is registered again by its client.",
    )
    problem_ttl_s: _Seconds = Field(
        3600.0, description="Seconds after its last use for which a registered problem is kept."
    )
    state_secret: SecretStr = Field(
        default_factory=lambda: SecretStr(secrets.token_urlsafe(32)),
        min_length=16,
        description="Key that signs state tokens, at least 16 characters; random at each start by default, which makes "
        "tokens from before a restart `state-gone`.",
    )

    secrets_dir: Path | None = Field(
        None,
        description="Folder of files that are named as variables and hold their values: for passwords and other things "
        "that should not be in an environment, which `docker inspect` shows. Read at the start.",
    )

    redis_url: SecretStr | None = Field(
        None,
        description="Redis, or what speaks its protocol, that replicas share: `redis://[[user]:password@]host[:port]"
        "[/db]`, `rediss://…` with TLS, `unix://path`. Then `ARGRAD_STATE_SECRET` must be given, the same to all.",
    )
    redis_prefix: str = Field(
        "argrad:", max_length=64, description="Before every key there; replicas of one deployment have the same."
    )
    redis_timeout_s: _Seconds = Field(
        0.2,
        description="Seconds that Redis may take to answer, and one more for 50 MB; after three times in a row it is "
        "left alone until a probe gets through, and solving goes on without.",
    )
    shared_state_bytes: Annotated[ByteSize, Field(ge=0)] = Field(
        ByteSize(64 * 1024),
        description="Largest forward state, problem and solution, that other replicas find in Redis; larger ones are "
        "sent again by whoever needs them elsewhere.",
    )
    shared_problem_bytes: Annotated[ByteSize, Field(ge=0)] = Field(
        ByteSize(16 * _MIB), description="Largest registered problem that other replicas find in Redis."
    )
    idempotency_ttl_s: _Seconds = Field(
        3600.0, description="Seconds for which the reply to a call with an `Idempotency-Key` is kept."
    )
    idempotency_budget_bytes: Annotated[ByteSize, Field(ge=0)] = Field(
        ByteSize(64 * _MIB),
        description="Memory for such replies where there is no Redis; the least recently used goes first.",
    )

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least level that is logged; health probes and metrics are logged at `debug`."
    )
    log_format: Literal["console", "json"] = Field(
        "console", description="Lines for people, or one JSON object a line; on standard error."
    )

    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://",
        description="Base URL of an OpenTelemetry collector that speaks OTLP over HTTP, such as "
        "`http://127.0.0.1:4318`: a span of each request, with its stages, goes there. Needs "
        "`pip install 'argrad[otel]'`; nothing is traced by default.",
    )

    @field_validator("api_keys")
    @classmethod
    def _check_keys(cls, entries: SecretStr) -> SecretStr:
        parse_keys(entries.get_secret_value(), "the list")
        return entries

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"found {origin!r}, wanted * or scheme and host as in https://example.org, no path")
        return origins

    @field_validator("allowed_hosts")
    @classmethod
    def _check_hosts(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not _HOST.fullmatch(name):
                raise ValueError(f"found {name!r}, wanted a name as in box.example, without scheme, port or *")
        return names

    @model_validator(mode="after")
    def _check_together(self) -> Settings:
        """Refuse what would let anybody in by mistake, and workers that could share nothing."""
        if not (self.is_loopback or self.has_keys or self.insecure):
            raise ValueError(
                f"{variable('host')} is {self.host!r}, which others may reach, and nobody is asked for an API key. "
                f"Make one with `argrad keys new NAME` and give {variable('api_keys')} or {variable('api_keys_file')}, "
                f"or listen on 127.0.0.1, or, where only those who may call can reach the address, say "
                f"{flag('insecure')} ({variable('insecure')}=true)"
            )
        if self.metrics_port is not None and self.uds is None and self.metrics_port == self.port:
            raise ValueError(
                f"{variable('metrics_port')} and {variable('port')} are both {self.port}: metrics are served apart, "
                "where nobody is asked for a key. Choose another port for one of them"
            )
        if self.workers > 1 and self.redis_url is None:
            raise ValueError(
                f"{variable('workers')} is {self.workers}, and there is no {variable('redis_url')}: workers share "
                "tokens, registered problems and rates through Redis. Give its address, or run replicas behind a proxy"
            )
        if "*" in self.cors_origins and not self.has_keys:
            raise ValueError(
                f"{variable('cors_origins')} cannot be *: without API keys every web page could use the service"
            )
        return self

    @property
    def has_keys(self) -> bool:
        """Whether callers are asked for a key."""
        return bool(self.api_keys.get_secret_value().strip()) or self.api_keys_file is not None

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None and not url.get_secret_value().startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("it begins with redis://, rediss:// or unix://")
        return url

    @model_validator(mode="after")
    def _check_secret(self) -> Settings:
        """Refuse replicas that could not read one another's tokens."""
        if self.redis_url is not None and "state_secret" not in self.model_fields_set:
            raise ValueError(
                f"{variable('redis_url')} (flag {flag('redis_url')}) is set without {variable('state_secret')}: "
                "replicas share tokens and records, and the key that signs them must be the same for all"
            )
        return self

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        if self.uds is not None or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name, which may lead anywhere
            return False

    def batch_budget(self) -> Budget | None:
        """How much is solved together; None without batching."""
        return Budget(flops=self.batch_flops, nbytes=int(self.batch_bytes)) if self.batching else None

    def limits(self) -> Limits:
        """The bounds on one call: what is named `max_*` here and has a place there."""
        return Limits(**{field.name: getattr(self, f"max_{field.name}") for field in fields(Limits)})


def load_settings(**given: Any) -> Settings:
    """Read the settings from the environment, and from files in `secrets_dir`; `given` ones come first.

    Raises:
        SettingsError: names each variable that has a wrong value, the value, and what is wrong with it.
    """
    folder = given.get("secrets_dir") or os.environ.get(variable("secrets_dir")) or None
    if folder is not None and not os.path.isdir(folder):
        raise SettingsError(_wrong("secrets_dir", repr(str(folder)), "there is no such folder"))
    try:
        return Settings(_secrets_dir=folder, **given)  # type: ignore[call-arg]  # BaseSettings' own
    except UnreadableError as error:
        raise SettingsError(_wrong("secrets_dir", repr(str(folder)), str(error.__cause__ or error))) from None
    except ValidationError as error:
        raise SettingsError("; ".join(_sentence(dict(e)) for e in error.errors())) from None


def _sentence(error: dict[str, Any]) -> str:
    reason: str = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return reason
    name = str(error["loc"][0])
    if name not in Settings.model_fields:
        return f"{name} is not a setting"
    value = "that value" if name in {"state_secret", "redis_url", "api_keys"} else repr(error["input"])
    reason = reason[:1].lower() + reason[1:] if error["type"] == "value_error" else reason.lower()
    return _wrong(name, value, reason)


def _wrong(name: str, value: str, reason: str) -> str:
    return f"{variable(name)} (flag {flag(name)}) cannot be {value}: {reason}"


def variable(name: str) -> str:
    """Environment variable of a setting."""
    return PREFIX + name.upper()


def flag(name: str) -> str:
    """Flag of `argrad serve` for a setting."""
    return "--" + name.replace("_", "-")


def default_text(name: str) -> str:
    """Default of a setting, as documentation and help print it."""
    default = Settings.model_fields[name].default
    if default is PydanticUndefined:
        return "random"
    if default is None or default == () or default == SecretStr(""):
        return "none"
    if isinstance(default, ByteSize):
        return default.human_readable(separator=" ").replace(".0 ", " ").replace(".0", "")
    return str(default)


def render_configuration() -> str:
    """docs/configuration.md, from the fields above."""
    rows = [
        f"| `{variable(name)}` | `{flag(name)}` | {default_text(name)} | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    table = ["| variable | flag | default | meaning |", "| --- | --- | --- | --- |", *rows]
    return "\n".join([_PREAMBLE, *table, "", _MEMORY])


_PREAMBLE = """\
# Configuration

<!-- Generated by `python -m argrad_service.settings > docs/configuration.md`; a test compares the two. -->

Every setting is an environment variable and a flag of `argrad serve`; the flag comes first, then the variable, then a
file of the variable's name in the folder that `--secrets-dir` names. Sizes take a number of bytes or a unit: `2097152`,
`2MiB`, `1.5GiB`. A wrong value ends the start with a message that names it.
"""

_MEMORY = """\
## Memory of one request

A body is in memory once: it is read, and decompressed, into the place where the solver looks at it; a body whose length
nobody announced (chunked, or a frame of zstd without its content's size) is there twice while it grows. The workspace
of the solver comes on top, and is at most

    8 · B · (8n² + 24rn + 2r² + 96(n + r)) bytes

for B problems with n variables and r constraints, or 2048 bytes a stored entry, variable and row of a sparse problem;
`ARGRAD_MAX_WORK_BYTES` bounds it. The reply to one cotangent is part of it, and goes out without a copy, or beside its
compressed one; many cotangents add theirs, which `ARGRAD_MAX_REPLY_BYTES` bounds. JSON, of 2 MiB at most by default,
takes up to twenty times its bytes while it is parsed.

So one request takes at most twice its body and that workspace, which the tests check in a process of its own, and as a
rule far less: 700 problems with n = m = 100, a body of 113 MB, take 3.0 times their body to solve with `pivoting`, the
state kept, and 6.0 times with `gradients: "full"`, whose reply is as large; 400 of them with `pdipm` take 5.0 and 6.1.
What was taken stays with the process for the next request.
"""

if __name__ == "__main__":
    print(render_configuration(), end="")
