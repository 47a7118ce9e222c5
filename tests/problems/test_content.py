"""The digest of registered parameters is fixed: clients and services of different versions must agree on it."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from argrad.errors import ProblemError
from argrad.problems.content import check_registrable, digest
from tests.docs.markdown import blocks

D = torch.float64
VECTORS = {
    "float64": (
        "qp",
        {"Q": torch.tensor([[4.0, 1.0], [1.0, 2.0]], dtype=D), "h": torch.tensor([0.0, torch.inf], dtype=D)},
        "a8ce899173dfe334e791c62f530fde650545f7586299fad54b0c2cf8e7a51507",
    ),
    "float32": (
        "qp_two_sided",
        {"A": torch.arange(6, dtype=torch.float32).reshape(1, 2, 3)},
        "b64bf5fad6d6f5a37349f93f636179a67f05128140fc77df7c476ce7562db786",
    ),
    "a number": (
        "qp",
        {"entropy": torch.tensor(0.5, dtype=D)},
        "71f5eeaaffb527425fcdb650edd154abacdf2e83e60cddc8326ea9477503762a",
    ),
    "integers": (
        "sparse_qp",
        {"Q_indptr": torch.tensor([0, 1, 2]), "Q_values": torch.tensor([1.0, -0.0], dtype=D)},
        "44b2975bf3545672e7858a7a474a6b57d8f90b568134dc21d2e517fc5f20ae4b",
    ),
}


@pytest.mark.parametrize("name", VECTORS)
def test_the_digest_of_fixed_parameters(name: str) -> None:
    kind, tensors, wanted = VECTORS[name]
    assert digest(kind, tensors) == wanted
    assert digest(kind, dict(reversed(tensors.items()))) == wanted


def test_the_page_defines_the_same_digest() -> None:
    """The Python of docs/api.md, which knows nothing of argrad."""
    (program,) = [block.text for block in blocks("docs/api.md") if "def problem_digest" in block.text]
    namespace: dict[str, object] = {}
    exec(program, namespace)
    problem_digest = namespace["problem_digest"]
    assert callable(problem_digest)
    for kind, tensors, wanted in VECTORS.values():
        assert problem_digest(kind, {name: tensor.numpy() for name, tensor in tensors.items()}) == wanted


def test_by_hand() -> None:
    data = np.array([1.0, 2.0], "<f8").tobytes()
    text = f"qp\nq F64 2 {hashlib.sha256(data).hexdigest()}\n"
    assert digest("qp", {"q": torch.tensor([1.0, 2.0], dtype=D)}) == hashlib.sha256(text.encode()).hexdigest()


def test_everything_counts() -> None:
    q = torch.tensor([1.0, 2.0], dtype=D)
    sets = [
        ("qp", {"q": q}),
        ("qp_two_sided", {"q": q}),
        ("qp", {"h": q}),
        ("qp", {"q": q.float()}),
        ("qp", {"q": q.reshape(1, 2)}),
        ("qp", {"q": q.flip(0)}),
        ("qp", {"q": q, "h": q}),
    ]
    assert len({digest(kind, tensors) for kind, tensors in sets}) == len(sets)


def test_the_order_of_memory_does_not_count() -> None:
    matrix = torch.arange(6, dtype=D).reshape(2, 3)
    assert digest("qp", {"G": matrix.t().contiguous().t()}) == digest("qp", {"G": matrix})


@pytest.mark.parametrize(
    ("kind", "tensors", "words"),
    [
        ("qp", {}, "problem: found no parameter"),
        ("qp", {"P": torch.eye(2)}, "problem.P: found an unknown parameter"),
        ("qp", {"G": torch.zeros(0, 2)}, r"problem.G: found shape \(0, 2\), no elements"),
        ("qp", {"q": torch.ones(2, dtype=torch.int64)}, "problem.q: found dtype torch.int64"),
        ("qp", {"Q": torch.eye(2), "G": torch.ones(1, 3)}, "problem.G: found shape"),
        ("qp", {"Q": torch.eye(2).expand(3, 2, 2), "h": torch.ones(2, 1)}, "problem.h: found a batch of 2"),
        ("qp", {"Q": torch.full((2, 2), torch.nan)}, r"problem.Q: found nan at \[0, 0\]"),
        ("qp", {"h": torch.tensor([-torch.inf])}, "problem.h: found -inf"),
        ("qp", {"lb": torch.tensor([torch.inf])}, "problem.lb: found inf"),
        ("qp", {"entropy": torch.tensor(0.0)}, "problem.entropy: found 0"),
        ("sparse_qp", {"Q_indptr": torch.ones(2, dtype=torch.int32)}, "problem.Q_indptr: found dtype torch.int32"),
        ("sparse_qp", {"Q_values": torch.tensor([torch.nan])}, "problem.Q_values: found nan"),
    ],
)
def test_what_cannot_be_registered(kind: str, tensors: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(ProblemError, match=words):
        check_registrable(kind, tensors)


def test_bounds_that_do_not_bind_may_be_registered() -> None:
    infinite = torch.full((2,), torch.inf)
    check_registrable("qp", {"h": infinite, "ub": infinite, "lb": -infinite})
    check_registrable("qp_two_sided", {"l": -infinite, "u": infinite})
