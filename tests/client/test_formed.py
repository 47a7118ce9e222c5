"""Gradients from the caller's adjoint agree with those from the canonical problem."""

from __future__ import annotations

import pytest
import torch

from argrad.client import Client
from argrad.problems import parse
from argrad.problems.formed import form_gradients
from tests.client.support import D, draw


def forms(batch: int | None) -> dict[str, tuple[str, dict[str, torch.Tensor]]]:
    qp = draw(3, batch=batch, batched="QqGhAb")
    n = qp["q"].shape[-1]
    lb, ub = torch.full((n,), -0.1, dtype=D), torch.full((n,), 0.2, dtype=D)
    ub[0], lb[1] = torch.inf, -torch.inf
    two_sided = draw(5, batch=batch, batched="Qq", m=3, p=0)
    l = torch.tensor([-0.1, -torch.inf, -0.3], dtype=D)
    u = torch.tensor([0.1, 0.2, -0.3], dtype=D)
    return {
        "plain": ("qp", qp),
        "bounded": ("qp", qp | {"lb": lb, "ub": ub.expand(batch, n) if batch else ub}),
        "shared": ("qp", draw(3, batch=batch, batched="qb")),
        "two-sided": ("qp_two_sided", {"P": two_sided["Q"], "q": two_sided["q"], "A": two_sided["G"], "l": l, "u": u}),
    }


@pytest.mark.parametrize("k", [None, 2], ids=["one-cotangent", "two-cotangents"])
@pytest.mark.parametrize("batch", [None, 3], ids=["single", "batch"])
@pytest.mark.parametrize("name", list(forms(None)))
def test_agrees_with_the_service(local: Client, name: str, batch: int | None, k: int | None) -> None:
    kind, parameters = forms(batch)[name]
    form = parse(kind, parameters)
    at = local.solve(form)
    block = "x" if kind == "qp_two_sided" else "z"
    shape = (() if k is None else (k,)) + tuple(at.solution[block].shape)
    upstream = {block: torch.randn(shape, dtype=D, generator=torch.Generator().manual_seed(1))}
    adjoint = local.vjp(at, upstream, gradients="adjoint").adjoint
    full = local.vjp(at, upstream).gradients
    assert adjoint is not None
    assert full is not None
    formed = form_gradients(kind, at.solution, adjoint, wrt=form.names, batched=form.batched)
    for parameter, gradient in full.items():
        assert formed[parameter].shape == gradient.shape
        assert torch.allclose(formed[parameter], gradient, rtol=1e-12, atol=1e-12), parameter
