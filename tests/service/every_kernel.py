"""Warm up, then call whatever reaches a kernel: prints the kernels that a call had to load or compile.

In a process of its own, with the parts of the warm-up to leave out as arguments.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import time

import torch
from numba.core.registry import CPUDispatcher
from torch import Tensor

import argrad
from argrad_service import engine, warming
from argrad_service.admission import Limits
from argrad_service.engine import kernels
from argrad_service.operations import Operations
from argrad_service.state import MemoryStateStore, TokenSigner

D = torch.float64
SHAPES: list[tuple[int, int, int, int, str]] = [
    (1, 2, 2, 0, ""),
    (8, 5, 10, 0, ""),
    (8, 5, 10, 2, ""),
    (4, 5, 5, 0, "Q"),
    (4, 5, 5, 0, "QG"),
    (4, 30, 20, 0, ""),
    (4, 20, 60, 0, ""),
    (2, 30, 20, 3, ""),
    (4, 30, 20, 0, "Q"),
    (32, 50, 50, 0, "QG"),
    (1, 14, 1, 0, ""),
]
"""Batch, variables, inequalities, equalities, and what the batch shares."""


def loaded() -> set[tuple[str, str, str]]:
    """Kernels, by module, name and the types that they are ready for."""
    found = set()
    for module in pkgutil.iter_modules(kernels.__path__):
        for name, value in vars(importlib.import_module(f"{kernels.__name__}.{module.name}")).items():
            if isinstance(value, CPUDispatcher):
                found |= {(module.name, name, str(signature)) for signature in value.signatures}
    return found


def problem(batch: int, n: int, m: int, p: int, shared: str) -> dict[str, Tensor]:
    """Strictly convex, with z = 0 in it."""
    random = torch.Generator().manual_seed(0)

    def draw(name: str, *shape: int) -> Tensor:
        return torch.randn(*(shape if name in shared else (batch, *shape)), dtype=D, generator=random)

    root = draw("Q", n, n)
    given = {"Q": root @ root.mT / n + torch.eye(n, dtype=D), "q": draw("q", n), "G": draw("G", m, n)}
    given["h"] = torch.ones(m, dtype=D)
    return given | ({"A": draw("A", p, n), "b": torch.zeros(p, dtype=D)} if p else {})


def call(client: argrad.Client) -> None:
    """Solve, from a solution too, and differentiate, by layer, by state and by point."""
    for given in (problem(*shape) for shape in SHAPES):
        leaves = {name: t.clone().requires_grad_() for name, t in given.items()}
        argrad.nn.QPLayer(client)(**leaves).square().sum().backward()
        plain = argrad.QP(**given)
        solution = client.solve(plain)
        client.solve(plain, warm_start=solution)
        client.solve(plain, upstream={"z": torch.ones_like(given["q"])})
    for layer in (argrad.nn.SimplexProjection(client), argrad.nn.Sparsemax(client), argrad.nn.Softmax(client)):
        x = torch.randn(8, 20, dtype=D, requires_grad=True)
        layer(x).square().sum().backward()


def main(left_out: list[str]) -> None:
    """Warm up without some parts, call, and print what was not ready."""
    signer = TokenSigner("of this test alone")
    store = MemoryStateStore(budget_bytes=1 << 20, ttl_s=60, signer=signer, clock=time.monotonic)
    operations = Operations(engine=engine, store=store, limits=Limits(), device=torch.device("cpu"))
    for name, part in warming.PARTS.items():
        if name not in left_out:
            part(operations)
    before = loaded()
    assert before or left_out
    with argrad.Client("local") as client:
        call(client)
    for module, name, _ in sorted(loaded() - before):
        print(module, name)


if __name__ == "__main__":
    main(sys.argv[1:])
