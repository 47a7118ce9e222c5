"""The command line: `argrad serve | solve | solvers | bench | doctor | keys`.

Exit status: 0, or 1 if what was asked failed, or 2 if it could not be asked (wrong flags, packages that are missing).
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Generator
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from argrad import keys, operations
from argrad._version import __version__
from argrad.arguments import DEFAULT_TIMEOUT_S, LOCAL
from argrad.bench import run
from argrad.bench.page import show
from argrad.bench.plan import Plan, StepKind, options_of
from argrad.client import Client
from argrad.errors import ArgradError, MissingExtraError, ProblemError
from argrad.operations import Exchange, Reply
from argrad.problems import QP
from argrad.wire import JSON, WireError, decode, encode
from argrad.wire.messages import Gradients, Precision, SolveRequest

COMMAND_GROUP = "argrad.commands"
"""Entry points of this group are commands that other packages bring: callables of argv that return an exit status."""

DEFAULT_URL = "http://127.0.0.1:8000"
_PACKAGES = ("torch", "numpy", "httpx", "pydantic", "orjson")
_ROUND_TRIPS = 20
_RETRIES = 5
"""Who types a command would rather know soon that nobody answers."""

Url = Annotated[str, typer.Option("--url", envvar="ARGRAD_URL", help="Address of the service, or 'local'.")]
ApiKey = Annotated[str | None, typer.Option("--api-key", envvar="ARGRAD_API_KEY", help="Sent as a bearer token.")]
TimeoutS = Annotated[float, typer.Option("--timeout-s", help="Seconds that a call may take.")]

app = typer.Typer(
    help="Gradients of optimisation problems, served.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

keys_app = typer.Typer(help="API keys of a service.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")


def main() -> None:
    """Entry point of the `argrad` command."""
    app()


@app.callback(invoke_without_command=True)
def _global(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if show_version:
        typer.echo(__version__)
        raise typer.Exit


@app.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def serve(context: typer.Context) -> None:
    """Run the service; `argrad serve --help` lists its flags."""
    found = list(entry_points(group=COMMAND_GROUP, name="serve"))
    try:
        command = found[0].load()
    except (IndexError, ImportError):
        _leave(MissingExtraError("argrad serve", "service"), status=2)
    raise typer.Exit(command(context.args))


@app.command()
def solve(
    file: Annotated[Path, typer.Argument(help="Body of POST /v1/solve as JSON; - reads standard input.")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    timeout_s: TimeoutS = DEFAULT_TIMEOUT_S,
) -> None:
    """Solve the problem in a JSON file and print the reply as JSON."""
    try:
        body = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        request, tensors = decode(SolveRequest, body, JSON)
    except (OSError, WireError, ProblemError) as error:
        _leave(error, status=2)

    def steps() -> Generator[Exchange, Reply, Reply]:
        return (yield Exchange("solve", request, tensors, operations.call_within(timeout_s, None, None)))

    try:
        with _client_of(url, api_key, timeout_s) as client:
            reply = client.run(steps())
    except ArgradError as error:
        _leave(error)
    text = b"".join(encode(*reply, JSON))
    typer.echo(json.dumps(json.loads(text), indent=2))


@app.command()
def solvers(url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """List solvers, what they solve, and how their solutions are differentiated."""
    try:
        with _client_of(url, api_key) as client:
            rows = client.solvers()["solvers"]
    except ArgradError as error:
        _leave(error)
    table = Table("solver", "problems", "methods", "devices", title=f"solvers at {url}", box=box.SIMPLE_HEAD)
    summaries = Table("solver", "what it is", box=box.SIMPLE_HEAD)
    for row in rows:
        problems = row["problems"] + row.get("sparse", {}).get("problems", [])
        columns = problems, [method["name"] for method in row["methods"]], row["devices"]
        table.add_row(row["name"], *(", ".join(words) for words in columns))
        summaries.add_row(row["name"], row["summary"] + ("" if row["installed"] else " Not installed there."))
    Console().print(table, summaries)


@app.command()
def bench(
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    callers: Annotated[
        int | None, typer.Option(help="Closed loop (the default, with 8): each sends as soon as it has its reply.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Open loop: steps a second, Poisson; latency counts from when each was due.")
    ] = None,
    in_flight: Annotated[int, typer.Option(help="Open loop: most steps at once.")] = 256,
    duration: Annotated[float, typer.Option(help="Seconds that are measured,")] = 10.0,
    warmup: Annotated[float, typer.Option(help="after so many of the same load.")] = 2.0,
    timeout_s: TimeoutS = 60.0,
    n: Annotated[int, typer.Option("--n", help="Variables of a problem.")] = 10,
    m: Annotated[int | None, typer.Option("--m", help="Inequalities; by default as many as variables.")] = None,
    p: Annotated[int, typer.Option("--p", help="Equalities.")] = 0,
    batch: Annotated[int, typer.Option(help="Problems of a call.")] = 1,
    step: Annotated[
        StepKind, typer.Option(help="What a caller does: the gradient comes in the same call, or in a second one.")
    ] = "solve+gradient",
    gradients: Annotated[
        Gradients | None, typer.Option(help="How gradients come back; by default as the adjoint, as layers ask for it.")
    ] = None,
    solver: Annotated[str, typer.Option(help="Of `argrad solvers`, or auto.")] = "auto",
    method: Annotated[str, typer.Option(help="Likewise.")] = "auto",
    precision: Annotated[Precision, typer.Option(help="Of what travels back.")] = "float64",
    seed: Annotated[int, typer.Option(help="Of the random problems and of the arrivals.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the result there too, as JSON; - prints it alone.")
    ] = None,
) -> None:
    """Load the service, and show throughput, latency and where the time goes; Ctrl-C shows what there is."""
    try:
        plan = Plan(
            url=url,
            callers=8 if callers is None and rate is None else callers,
            rate=rate,
            in_flight=in_flight,
            duration_s=duration,
            warmup_s=warmup,
            timeout_s=timeout_s,
            n=n,
            m=n if m is None else m,
            p=p,
            batch=batch,
            step=step,
            options=options_of(solver, method, precision),
            gradients=gradients,
            seed=seed,
        )
    except ProblemError as error:
        _leave(error, status=2)
    try:
        result = run(plan, api_key)
    except ArgradError as error:
        _leave(error)
    text = result.model_dump_json(indent=2)
    if str(json_file) == "-":
        typer.echo(text)
    else:
        show(result, Console())
    if json_file is not None and str(json_file) != "-":
        try:
            json_file.write_text(text + "\n")
        except OSError as error:
            _leave(error)
    raise typer.Exit(0 if result.steps else 1)


@app.command()
def doctor(url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Report versions and devices, and whether the service answers and how fast."""
    table = Table("what", "found", title="argrad doctor")
    table.add_row("argrad", __version__)
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for package in _PACKAGES:
        table.add_row(package, _version(package))
    cuda = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    table.add_row("cores, GPU here", f"{os.cpu_count()}, {cuda}")
    is_well = True
    for target in dict.fromkeys((LOCAL, url)):
        is_well &= _examine(table, target, api_key, is_needed=target == url)
    Console().print(table)
    raise typer.Exit(0 if is_well else 1)


@keys_app.command("new")
def new_key(
    name: Annotated[
        str, typer.Argument(help="Who will have it: it stands in logs, and owns what is sent with the key.")
    ],
    file: Annotated[
        Path | None, typer.Option(help="Append the line to this file (ARGRAD_API_KEYS_FILE) instead of printing it.")
    ] = None,
) -> None:
    """Make an API key. Prints it, this once, and then the line by which a service knows it without having it."""
    key = keys.new_key()
    try:
        line = keys.stored_line(name, key)
        if file is not None:
            keys.append_line(file, line)
    except (ProblemError, OSError) as error:
        _leave(error, status=2)
    typer.echo(key)
    if file is None:
        typer.echo(line)
    note = "for ARGRAD_API_KEYS or a file of keys" if file is None else f"its line is in {file}"
    typer.echo(f"a key for {name}; {note}", err=True)


@keys_app.callback()
def _keys() -> None:
    """Without a callback, a group of one command would be that command."""


def _client_of(url: str, api_key: str | None, timeout_s: float = DEFAULT_TIMEOUT_S) -> Client:
    """A client of the service; leaves where the flags name none."""
    try:
        return Client(url, api_key=api_key, timeout_s=timeout_s, retries=_RETRIES)
    except (ProblemError, MissingExtraError) as error:
        _leave(error, status=2)


def _examine(table: Table, target: str, api_key: str | None, *, is_needed: bool) -> bool:
    """Solve a small problem there and note what came of it; False only if a needed target failed."""
    problem = QP(Q=torch.eye(2, dtype=torch.float64), q=torch.ones(2, dtype=torch.float64))
    times_s = []
    try:
        with Client(target, api_key=api_key, retries=0, timeout_s=30.0) as client:
            device = client.solvers().get("device", "unknown")
            for _ in range(_ROUND_TRIPS):
                began = time.perf_counter()
                client.solve(problem, keep_state=False)
                times_s.append(time.perf_counter() - began)
    except ArgradError as error:
        table.add_row(target, f"{type(error).__name__}: {error}")
        return not is_needed
    table.add_row(target, f"solves on {device}; {1e3 * statistics.median(times_s):.2f} ms a round trip")
    return True


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _leave(error: Exception, *, status: int = 1) -> NoReturn:
    """Say what went wrong in one line, and leave."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"argrad: {error}", markup=False)
    raise typer.Exit(status)


if __name__ == "__main__":
    main()
