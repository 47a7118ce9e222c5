"""Iterations of cold and warm-started solves in two training loops: `python -m benchmarks.warm_start`.

    MNIST        the network of `examples/mnist.py`, Q, G, h, A, b learned, q from the image; 64 images a step
    denoising    total variation of 16 signals of 50 values, the operator D learned, from differences

"same batch" sees the same problems at each step, as full-batch training does; "shuffled" draws others for each. Both
runs of a pair begin alike; a solve ends at the tolerance 1e-8, so they train alike too. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from argrad.arguments import LOCAL, load_backend
from argrad.backend import Call
from argrad.client import Client
from argrad.nn import QPLayer, TotalVariation, differences
from argrad.wire.messages import SolveReply, SolveRequest, TensorMap
from examples.mnist import Network, load_images

SOLVERS = ("pdipm", "admm", "osqp", "pivoting")
MAX_ITERATIONS = 10_000


class Counting:
    """The engine in this process, which keeps count of iterations and seconds of solves."""

    def __init__(self) -> None:
        self._inner = load_backend(LOCAL)
        self.means: list[float] = []
        self.seconds: list[float] = []

    def solve(self, request: SolveRequest, tensors: TensorMap, call: Call) -> tuple[SolveReply, TensorMap]:
        """Pass on, and count."""
        began = time.perf_counter()
        reply, out = self._inner.solve(request, tensors, call)
        self.seconds.append(time.perf_counter() - began)
        self.means.append(float(out["report.iterations"].double().mean()))
        return reply, out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def mnist(layer: Callable[..., nn.Module], steps: int, *, is_shuffled: bool) -> Iterator[None]:
    """Train on digits; yields after each step."""
    images, _ = load_images(0)
    network = Network(layer(QPLayer))
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    order = torch.randperm(len(images.digits))
    for step in range(steps):
        chosen = order[64 * step : 64 * (step + 1)] if is_shuffled else order[:64]
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(images.pixels[chosen]), images.digits[chosen]).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        yield


def denoising(layer: Callable[..., nn.Module], steps: int, *, is_shuffled: bool) -> Iterator[None]:
    """Learn what is sparse in signals of few jumps; yields after each step."""
    clean, noisy = draw_signals(16 * steps)
    D = nn.Parameter(differences(50, dtype=torch.float64))
    denoise = layer(TotalVariation)
    optimiser = torch.optim.Adam([D], lr=1e-3)
    for step in range(steps):
        rows = slice(16 * step, 16 * (step + 1)) if is_shuffled else slice(0, 16)
        optimiser.zero_grad()
        (denoise(noisy[rows], D, 0.5) - clean[rows]).square().mean().backward()
        optimiser.step()
        yield


def draw_signals(count: int) -> tuple[Tensor, Tensor]:
    """Piecewise constant signals `(count, 50)` with about five jumps, and the same with noise of deviation 0.3."""
    jumps = torch.randn(count, 50, dtype=torch.float64) * (torch.rand(count, 50) < 0.1)
    clean = jumps.cumsum(dim=-1)
    return clean, clean + 0.3 * torch.randn(clean.shape, dtype=torch.float64)


def measure(train: Callable[..., Iterator[None]], solver: str, steps: int, *, is_shuffled: bool, is_warm: bool) -> str:
    """Mean iterations and mean milliseconds of a solve, without the first one."""
    torch.manual_seed(0)
    backend = Counting()
    client = Client(backend)

    def layer(kind: type[Any]) -> nn.Module:
        made: nn.Module = kind(client, solver=solver, max_iterations=MAX_ITERATIONS, warm_start=is_warm)
        return made

    for _ in train(layer, steps, is_shuffled=is_shuffled):
        pass
    mean, seconds = (sum(values[1:]) / len(values[1:]) for values in (backend.means, backend.seconds))
    return f"{mean:.1f} ({1e3 * seconds:.1f} ms)"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    steps = parser.parse_args().steps
    print("| training | batches | solver | cold | warm |\n| --- | --- | --- | --- | --- |")
    for train in (mnist, denoising):
        for is_shuffled in (False, True):
            for solver in SOLVERS:
                cold, warm = (
                    measure(train, solver, steps, is_shuffled=is_shuffled, is_warm=is_warm) for is_warm in (False, True)
                )
                batches = "shuffled" if is_shuffled else "same batch"
                print(f"| {train.__name__} | {batches} | `{solver}` | {cold} | {warm} |", flush=True)


if __name__ == "__main__":
    main()
