"""The service on Ray Serve: the same application, on as many machines as a Ray cluster has.

    python -m argrad_service.ray --min-replicas 2 --max-replicas 8 --gpus 0.25

starts or joins a cluster, deploys, and serves until a signal ends it. `serve run argrad_service.ray:application`
deploys by Ray's own tools instead; `SESSION_HEADER` must then be in the environment of the cluster.

Ray's proxy sends calls of one `Argrad-Affinity` key to one replica, which holds that solve's state, by consistent
hashing; without a key, anywhere. All settings are those of `argrad serve`; host and port are the proxy's.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from argrad.errors import ArgradError, MissingExtraError
from argrad_service.app import create_app
from argrad_service.engine.threads import use_threads
from argrad_service.server import PROCESS_ENVIRONMENT
from argrad_service.settings import Settings, load_settings

SESSION_HEADER = {"RAY_SERVE_SESSION_ID_HEADER_KEY": "argrad-affinity"}
"""Which header Ray's proxies take for a session's name; read when they are imported."""

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
NAME = "argrad"


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """How many replicas, of what.

    Args:
        min_replicas: That there always are.
        max_replicas: That there are under load.
        calls_per_replica: Calls in a replica, on average, above which there will be more replicas: about what one of
            them solves together.
        cpus: Cores of a replica, and threads of its operations; a part of one counts as one thread.
        gpus: GPUs of a replica; parts let several replicas share one.

    Raises:
        ProblemError: the numbers make no deployment.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    calls_per_replica: float = 32.0
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("min_replicas", 1), ("max_replicas", self.min_replicas), ("calls_per_replica", 1)):
            if getattr(self, name) < least:
                raise ArgradError(f"{name}: found {getattr(self, name)!r}, wanted at least {least}")
        for name in ("cpus", "gpus"):
            if getattr(self, name) < 0:
                raise ArgradError(f"{name}: found {getattr(self, name)!r}, wanted 0 or more")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ArgradError(f"gpus: found {self.gpus!r}, wanted a part of one GPU or a whole number of them")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> RayOptions:
        """Options by name, as words or numbers.

        Raises:
            ArgradError: a name that there is not, or a value that is no number.
        """
        kinds: dict[str, Callable[[Any], float]] = {
            field.name: int if field.name.endswith("replicas") else float for field in fields(cls)
        }
        unknown = sorted(set(given) - set(kinds))
        if unknown:
            raise ArgradError(f"options: found {', '.join(unknown)}, wanted some of {', '.join(kinds)}")
        options: dict[str, Any] = {}
        for name, value in given.items():
            try:
                options[name] = kinds[name](value)
            except (TypeError, ValueError):
                raise ArgradError(f"{name}: found {value!r}, wanted a number") from None
        return cls(**options)


class Replica:
    """What Ray asks of a replica beside its application.

    Args:
        settings: Of every replica; the secret that signs tokens among them.
        threads: Of one torch operation.
    """

    def __init__(self, settings: Settings, threads: int) -> None:
        use_threads(settings.torch_threads or threads)
        self._app = create_app(settings)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """What Ray calls; the name is Ray's."""
        return _Plain(self._app)

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises.

        Raises:
            RuntimeError: the first solve failed, or solver threads are gone.
        """
        readiness = self._app.state.readiness
        solver = readiness.scheduler.health()
        if readiness.phase == "failed" or (readiness.phase == "ready" and solver.alive < solver.threads):
            raise RuntimeError(f"the service is {readiness.phase}: {readiness.reason or solver.last_crash}")


class _Plain:
    """The application with bodies that can be pickled: Ray hands messages from the replica to its proxy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_plain(message: Message) -> None:
            if isinstance(message.get("body"), memoryview):
                message = {**message, "body": bytes(message["body"])}
            await send(message)

        await self._app(scope, receive, send_plain)


def application(options: Mapping[str, Any] | RayOptions | None = None, settings: Settings | None = None) -> Any:
    """The deployment, for `serve.run`, or for `serve run argrad_service.ray:application max_replicas=4`.

    Args:
        options: Of the deployment, as `RayOptions` or by name.
        settings: Of the service; from the environment by default.

    Returns:
        A `ray.serve.Application`.

    Raises:
        ArgradError: an option or a setting has a wrong value.
        MissingExtraError: Ray is not installed.
    """
    options = options if isinstance(options, RayOptions) else RayOptions.of(options or {})
    settings = settings or load_settings()
    serve = _load_serve()
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig

    threads = max(1, int(options.cpus))
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=NAME,
        ray_actor_options={
            "num_cpus": options.cpus,
            "num_gpus": options.gpus,
            "runtime_env": {"env_vars": {**PROCESS_ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}},
        },
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.min_replicas,
            max_replicas=options.max_replicas,
            target_ongoing_requests=options.calls_per_replica,
        ),
        max_ongoing_requests=settings.max_pending,
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        graceful_shutdown_timeout_s=settings.shutdown_timeout_s,
        health_check_period_s=5,
    )
    return deployment.bind(settings, threads)


def main(argv: Sequence[str]) -> int:
    """Deploy, and serve until a signal ends it.

    Args:
        argv: Flags, without the name of the program.

    Returns:
        Exit status: 0 after a signal, 2 for wrong flags or settings.
    """
    given = vars(_parser().parse_args(argv))
    address = given.pop("address")
    os.environ.update({name: os.environ.get(name, text) for name, text in SESSION_HEADER.items()})
    try:
        settings = load_settings()
        deployed = application({name: text for name, text in given.items() if text is not None}, settings)
    except ArgradError as error:
        print(f"argrad_service.ray: {error}", file=sys.stderr)
        return 2
    import ray

    serve = _load_serve()
    stopped = threading.Event()
    ray.init(address=address, include_dashboard=False, log_to_driver=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    try:
        serve.start(http_options={"host": settings.host, "port": settings.port, "request_timeout_s": None})
        serve.run(deployed, name=NAME, route_prefix="/")
        print(f"argrad on http://{settings.host}:{settings.port}, by Ray Serve {ray.__version__}", flush=True)
        stopped.wait()
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0


def _load_serve() -> Any:
    try:
        from ray import serve
    except ImportError:
        raise MissingExtraError("Ray Serve", "ray") from None
    return serve


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m argrad_service.ray",
        description="Serve gradients of optimisation problems by Ray Serve. Its settings are ARGRAD_* variables.",
        allow_abbrev=False,
    )
    parser.add_argument("--address", help="of a Ray cluster, or auto; one on this machine by default")
    for field in fields(RayOptions):
        name = field.name.replace("_", "-")
        parser.add_argument(f"--{name}", dest=field.name, metavar="N", help=f"default {field.default}")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
