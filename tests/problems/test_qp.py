"""QP: what its shapes and values may be, what is said of those that may not, and gradients from an adjoint."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from argrad.errors import ProblemError
from argrad.problems import QP, Adjoint, Solution, check_finite, gradients
from tests.problems import exact


def ones(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.ones(*shape, dtype=dtype)


GOOD = {"Q": ones(2, 2), "q": ones(2), "G": ones(3, 2), "h": ones(3), "A": ones(1, 2), "b": ones(1)}


def test_sizes_and_batch() -> None:
    problem = QP(**GOOD)
    assert (problem.n, problem.m, problem.p, problem.batch_size) == (2, 3, 1, None)
    assert problem.dtype == torch.float64
    assert problem.device.type == "cpu"
    batched = QP(**GOOD | {"h": ones(5, 3), "A": ones(5, 1, 2)})
    assert batched.batch_size == 5
    assert [name for name in GOOD if batched.is_batched(name)] == ["h", "A"]
    assert list(batched.parameters()) == list(GOOD)


@pytest.mark.parametrize(
    ("G", "h"),
    [
        (None, None),
        (ones(0), ones(0)),
        (ones(0, 2), ones(0)),
        (ones(4, 0, 2), ones(4, 0)),
        (ones(4, 0), ones(4, 0)),
        (ones(0, 2), None),
        (None, ones(0)),
    ],
    ids=["none", "json", "plain", "batched", "json-batched", "matrix-only", "vector-only"],
)
def test_a_matrix_without_rows_is_absent(G: Tensor | None, h: Tensor | None) -> None:
    problem = QP(Q=ones(2, 2), q=ones(2), G=G, h=h)
    assert (problem.G, problem.h, problem.m, problem.batch_size) == (None, None, 0, None)
    assert list(problem.parameters()) == ["Q", "q"]


WRONG = {
    "q-missing": ({"q": None}, r"problem\.q: found nothing, wanted a tensor of shape \(n,\) or \(B, n\)"),
    "list": ({"q": [1.0, 2.0]}, r"problem\.q: found list, wanted a torch\.Tensor"),
    "list-for-G": ({"G": [[1.0]]}, r"problem\.G: found list, wanted a torch\.Tensor"),
    "list-alone": ({"G": [[1.0]], "h": None}, r"problem\.h: found nothing, wanted a tensor"),
    "half": (
        {"q": ones(2, dtype=torch.float16)},
        r"q: found dtype torch\.float16, wanted torch\.float64 or torch\.float",
    ),
    "integer": ({"h": ones(3, dtype=torch.int64)}, r"h: found dtype torch\.int64, wanted torch\.float64 or"),
    "mixed-dtype": (
        {"q": ones(2, dtype=torch.float32)},
        r"problem\.q: found dtype torch\.float32, wanted dtype torch\.float64, as problem\.Q has",
    ),
    "mixed-device": (
        {"b": torch.ones(1, dtype=torch.float64, device="meta")},
        r"problem\.b: found device meta, wanted device cpu, as problem\.Q has",
    ),
    "scalar": ({"q": torch.tensor(1.0, dtype=torch.float64)}, r"q: found shape \(\), wanted \(n,\) or \(B, n\)"),
    "rank-low": ({"Q": ones(2)}, r"problem\.Q: found shape \(2,\), wanted \(n, n\) or \(B, n, n\)"),
    "rank-high": ({"G": ones(1, 1, 3, 2)}, r"problem\.G: found shape \(1, 1, 3, 2\), wanted \(m, n\) or \(B, m, n\)"),
    "Q-not-square": ({"Q": ones(3, 2)}, r"problem\.Q: found shape \(3, 2\), wanted \(2, 2\) or \(B, 2, 2\)"),
    "Q-size": ({"Q": ones(3, 3)}, r"problem\.Q: found shape \(3, 3\), wanted \(2, 2\) or \(B, 2, 2\)"),
    "G-columns": ({"G": ones(3, 4)}, r"problem\.G: found shape \(3, 4\), wanted \(3, 2\) or \(B, 3, 2\)"),
    "G-rows": ({"G": ones(5, 2, 2)}, r"problem\.G: found shape \(5, 2, 2\), wanted \(3, 2\) or \(B, 3, 2\)"),
    "G-empty-h-not": ({"G": ones(0, 2)}, r"problem\.G: found shape \(0, 2\), wanted \(3, 2\)"),
    "h-empty-G-not": ({"h": ones(0)}, r"problem\.G: found shape \(3, 2\), wanted \(0, 2\)"),
    "h-missing": ({"h": None}, r"problem\.h: found nothing, wanted a tensor, as problem\.G is given \(or neither"),
    "A-missing": ({"A": None}, r"problem\.A: found nothing, wanted a tensor, as problem\.b is given"),
    "no-variables": ({"Q": ones(0, 0), "q": ones(0)}, r"problem\.q: found shape \(0,\), no variables, wanted at least"),
    "batch-of-0": ({"q": ones(0, 2)}, r"problem\.q: found a batch of 0, wanted at least one problem"),
    "batch-of-0-G": ({"G": ones(0, 3, 2)}, r"problem\.G: found a batch of 0, wanted at least one problem"),
    "batch-of-0-empty": ({"G": ones(0, 0, 2), "h": ones(0, 0)}, r"problem\.G: found a batch of 0"),
    "batches-differ": (
        {"q": ones(3, 2), "h": ones(4, 3)},
        r"problem\.h: found a batch of 4, wanted 3, as problem\.q has, or no batch dimension",
    ),
    "batch-of-1-is-not-shared": ({"Q": ones(1, 2, 2), "q": ones(3, 2)}, r"problem\.q: found a batch of 3, wanted 1"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        QP(**GOOD | change)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_only_h_may_be_infinite(name: str, value: float) -> None:
    changed = GOOD[name].expand(2, *GOOD[name].shape).clone()
    changed[1].view(-1)[-1] = value
    problem = QP(**GOOD | {name: changed})
    if name == "h" and value == torch.inf:
        problem.check_finite()
        return
    wanted = "finite numbers or \\+inf" if name == "h" else "finite numbers$"
    where = ", ".join(str(size - 1) for size in changed.shape)
    with pytest.raises(ProblemError, match=rf"problem\.{name}: found {value} at \[{where}\], wanted {wanted}"):
        problem.check_finite()


def test_finite_numbers_whose_sum_overflows_are_finite() -> None:
    check_finite("x", torch.full((4,), 1e308, dtype=torch.float64))
    check_finite("x", torch.full((4,), 3e38, dtype=torch.float32).requires_grad_())


def random_problem(seed: int, *, shared: frozenset[str] = frozenset(), batch: int = 3) -> QP:
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, *shape: int) -> Tensor:
        return torch.randn(*(() if name in shared else (batch,)), *shape, dtype=torch.float64, generator=generator)

    root, z = draw("Q", 4, 4), torch.randn(4, dtype=torch.float64, generator=generator)
    G, A = draw("G", 3, 4), draw("A", 1, 4)
    h = G @ z + 0.3 * draw("h", 3).abs() if "G" in shared or "h" not in shared else (G @ z).amax(0) + 0.1
    b = A @ z
    Q = root @ root.mT + torch.eye(4, dtype=torch.float64)
    return QP(Q=Q, q=3 * draw("q", 4), G=G, h=h, A=A, b=b)


@pytest.mark.parametrize("shared", [(), ("Q",), ("q",), ("G",), ("A",), ("G", "h"), ("Q", "G", "A"), ("Q", "q", "A")])
def test_gradients_agree_with_central_differences(shared: tuple[str, ...]) -> None:
    problem = random_problem(5, shared=frozenset(shared))
    solution = exact.solve(problem)
    assert (solution.lam > 1e-3).any()
    generator = torch.Generator().manual_seed(1)
    weights = {k: torch.randn(t.shape, dtype=t.dtype, generator=generator) for k, t in solution.blocks().items()}
    adjoint = exact.differentiate(problem, solution, weights)
    batched = [name for name in problem.parameters() if problem.is_batched(name)]
    found = gradients(solution, adjoint, wrt=list(problem.parameters()), batched=batched)

    def loss(parameters: dict[str, Tensor]) -> float:
        blocks = exact.solve(QP(**parameters)).blocks()
        return float(sum((weights[k] * blocks[k]).sum() for k in blocks))

    for name, parameter in problem.parameters().items():
        assert found[name].shape == parameter.shape
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        step = 1e-5 * direction
        plus, minus = (loss(problem.parameters() | {name: parameter + sign * step}) for sign in (1, -1))
        assert (found[name] * direction).sum().item() == pytest.approx((plus - minus) / 2e-5, rel=1e-7, abs=1e-7)


def test_the_gradient_of_a_shared_parameter_is_the_sum_over_the_batch_and_k_stands_in_front() -> None:
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    solution = Solution(z=draw(3, 4), nu=draw(3, 1), lam=draw(3, 2), s=draw(3, 2))
    adjoint = Adjoint(z=draw(5, 3, 4), nu=draw(5, 3, 1), mu=draw(5, 3, 2))
    names = ("Q", "q", "G", "h", "A", "b")
    batched = gradients(solution, adjoint, wrt=names, batched=names)
    shared = gradients(solution, adjoint, wrt=names, batched=())
    assert {k: tuple(t.shape) for k, t in batched.items()} == {
        "Q": (5, 3, 4, 4),
        "q": (5, 3, 4),
        "G": (5, 3, 2, 4),
        "h": (5, 3, 2),
        "A": (5, 3, 1, 4),
        "b": (5, 3, 1),
    }
    for name in names:
        torch.testing.assert_close(shared[name], batched[name].sum(1), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(batched["Q"], batched["Q"].mT, rtol=0, atol=0)
    one = gradients(solution, Adjoint(z=adjoint.z[2], nu=adjoint.nu[2], mu=adjoint.mu[2]), wrt=names, batched=names)
    for name in names:
        torch.testing.assert_close(one[name], batched[name][2], rtol=0, atol=0)


@pytest.mark.parametrize("k", [(), (3,)])
def test_large_outer_products_are_the_same_as_small_ones(k: tuple[int, ...]) -> None:
    """From some size on they are formed by a product of matrices."""
    n, m, generator = 40, 30, torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    z, lam, empty = draw(2, n), draw(2, m), torch.empty(2, 0, dtype=torch.float64)
    d_z, mu = draw(*k, 2, n), draw(*k, 2, m)
    found = gradients(
        Solution(z=z, nu=empty, lam=lam, s=lam),
        Adjoint(z=d_z, nu=empty.expand(*k, 2, 0), mu=mu),
        wrt=["Q", "G"],
        batched=["Q", "G"],
    )
    Q = torch.einsum("...bi,bj->...bij", d_z, z)
    G = torch.einsum("...bi,bj->...bij", mu, z) + torch.einsum("bi,...bj->...bij", lam, d_z)
    torch.testing.assert_close(found["Q"], 0.5 * (Q + Q.mT), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(found["G"], G, rtol=1e-14, atol=1e-14)
