"""Forms: bounds and two-sided rows to the canonical QP and back, with duals, gradients, cotangents and tangents."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from argrad.errors import ProblemError
from argrad.problems import Adjoint, Form, Solution, gradients, parse, with_bounds, with_two_sided
from tests.problems import exact

INF = torch.inf
B, N = 3, 5


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def bounded(seed: int, batched: frozenset[str], *, equal: bool = False) -> dict[str, Tensor]:
    """A QP with all eight parameters; some bounds are infinite somewhere, some everywhere, some variables fixed."""
    g = torch.Generator().manual_seed(seed)

    def lead(name: str) -> tuple[int, ...]:
        return (B,) if name in batched else ()

    root = randn(g, *lead("Q"), N, N)
    lb = torch.where(randn(g, *lead("lb"), N) > 1.5, -INF, -0.3 - 0.5 * randn(g, *lead("lb"), N).abs())
    ub = torch.where(randn(g, *lead("ub"), N) > 1.5, INF, 0.3 + 0.5 * randn(g, *lead("ub"), N).abs())
    lb[..., 0], ub[..., 1] = -INF, INF
    if equal:
        fixed = 0.2 * randn(g, *(lead("lb") or lead("ub")), 2)
        lb, ub = (side.expand(*fixed.shape[:-1], N).clone() for side in (lb, ub))
        lb[..., 3:], ub[..., 3:] = fixed, fixed
    # The rows leave the variables that may be fixed alone: so every draw is feasible.
    free = tensor([1.0, 1, 1, 0, 0]) if equal else tensor([1.0] * N)
    return {
        "Q": root @ root.mT + torch.eye(N, dtype=torch.float64),
        "q": 4 * randn(g, *lead("q"), N),
        "G": randn(g, *lead("G"), 2, N) * free,
        "h": 0.5 + 0.3 * randn(g, *lead("h"), 2).abs(),
        "A": randn(g, *lead("A"), 1, N) * free,
        "b": 0.05 * randn(g, *lead("b"), 1),
        "lb": lb,
        "ub": ub,
    }


def two_sided(seed: int, batched: frozenset[str], *, equal: bool = False) -> dict[str, Tensor]:
    """A QP with six rows: free, one-sided, two-sided, infinite in some problems, and, if asked for, two equalities."""
    g = torch.Generator().manual_seed(seed)

    def lead(name: str) -> tuple[int, ...]:
        return (B,) if name in batched else ()

    root, rows = randn(g, *lead("P"), N, N), 6
    l, u = -0.2 - 0.5 * randn(g, *lead("l"), rows).abs(), 0.2 + 0.5 * randn(g, *lead("u"), rows).abs()
    l[..., :2], u[..., 0], u[..., 2] = -INF, INF, INF
    if "l" in batched:
        l[0, 3] = -INF
    if equal:
        value = 0.2 * randn(g, *(lead("l") or lead("u")), 2)
        l, u = (side.expand(*value.shape[:-1], rows).clone() for side in (l, u))
        l[..., 4:], u[..., 4:] = value, value
    return {
        "P": root @ root.mT + torch.eye(N, dtype=torch.float64),
        "q": 4 * randn(g, *lead("q"), N),
        "A": randn(g, *lead("A"), rows, N),
        "l": l,
        "u": u,
    }


DRAW = {"qp": bounded, "qp_two_sided": two_sided}
BATCHED = {
    "qp": [
        "",
        "q",
        "lb",
        "ub",
        "Q",
        "G h",
        "A b ub",
        "Q q G h A b",
        "Q q G h A b lb ub",
    ],
    "qp_two_sided": ["", "q", "l", "u", "P", "A", "l u", "P q A l u"],
}
CASES = [
    pytest.param(kind, frozenset(names.split()), id=f"{kind}-{names or 'none'}")
    for kind in BATCHED
    for names in BATCHED[kind]
]


def weigh(blocks: Mapping[str, Tensor], seed: int = 7) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: randn(g, *block.shape) for name, block in blocks.items()}


def loss(kind: str, parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> float:
    form = parse(kind, parameters)
    blocks = form.solution(exact.solve(form.problem))
    return float(sum((weights[name] * blocks[name]).sum() for name in weights))


def exact_gradients(form: Form, weights: Mapping[str, Tensor]) -> tuple[Solution, dict[str, Tensor]]:
    solution = exact.solve(form.problem)
    adjoint = exact.differentiate(form.problem, solution, form.upstream(weights, solution))
    return solution, form.gradients(solution, adjoint, form.names)


@pytest.mark.parametrize(("kind", "batched"), CASES)
def test_the_solution_satisfies_the_callers_own_optimality_conditions(kind: str, batched: frozenset[str]) -> None:
    p = DRAW[kind](3, batched, equal=True)
    form = parse(kind, p)
    s = form.solution(exact.solve(form.problem))
    size = () if not batched else (B,)
    mv = lambda M, x: (M @ x.unsqueeze(-1)).squeeze(-1)  # noqa: E731
    if kind == "qp":
        lengths = {"z": N, "nu": 1, "lam": 2, "s": 2, "lam_lb": N, "lam_ub": N}
        assert {k: tuple(v.shape) for k, v in s.items()} == {k: (*size, length) for k, length in lengths.items()}
        z = s["z"]
        stationarity = (
            mv(p["Q"], z) + p["q"] + mv(p["A"].mT, s["nu"]) + mv(p["G"].mT, s["lam"]) - s["lam_lb"] + s["lam_ub"]
        )
        torch.testing.assert_close(s["s"], p["h"] - mv(p["G"], z), rtol=0, atol=1e-12)
        rows, lower, upper, low, high = z, p["lb"], p["ub"], s["lam_lb"], s["lam_ub"]
        assert (low >= 0).all()
        assert (high >= 0).all()
    else:
        assert {k: tuple(v.shape) for k, v in s.items()} == {"x": (*size, N), "y": (*size, 6)}
        x, y = s["x"], s["y"]
        stationarity = mv(p["P"], x) + p["q"] + mv(p["A"].mT, y)
        rows, lower, upper, low, high = mv(p["A"], x), p["l"], p["u"], (-y).clamp(min=0), y.clamp(min=0)
    assert stationarity.abs().max() < 1e-11
    assert (rows - lower).min() > -1e-12
    assert (upper - rows).min() > -1e-12
    torch.testing.assert_close(rows[low > 0], lower.expand_as(rows)[low > 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(rows[high > 0], upper.expand_as(rows)[high > 0], rtol=0, atol=1e-12)
    assert ((low > 0) | (high > 0)).any()


@pytest.mark.parametrize(("kind", "batched"), CASES)
def test_gradients_agree_with_central_differences(kind: str, batched: frozenset[str]) -> None:
    parameters = DRAW[kind](11, batched)
    form = parse(kind, parameters)
    assert form.names == tuple(parameters)
    assert form.batched == batched
    assert form.batch_size == (B if batched else None)
    weights = weigh(form.solution(exact.solve(form.problem)))
    _, found = exact_gradients(form, weights)
    for name, direction in weigh(parameters, 8).items():
        assert found[name].shape == parameters[name].shape
        step = 1e-5 * direction
        plus, minus = (loss(kind, parameters | {name: parameters[name] + sign * step}, weights) for sign in (1, -1))
        assert (found[name] * direction).sum().item() == pytest.approx((plus - minus) / 2e-5, rel=1e-7, abs=2e-7)


@pytest.mark.parametrize(("kind", "lower", "upper"), [("qp", "lb", "ub"), ("qp_two_sided", "l", "u")])
@pytest.mark.parametrize("sides", ["", "both"])
def test_a_row_with_equal_sides_has_one_sided_gradients(kind: str, lower: str, upper: str, sides: str) -> None:
    """Each side's gradient is the derivative towards the feasible side; moved together they make a smooth one."""
    batched = frozenset({"q"} | ({lower, upper} if sides else set()))
    parameters = DRAW[kind](11, batched, equal=True)
    form = parse(kind, parameters)
    equal = form.row_map.equal
    assert len(equal) == 2
    weights = weigh(form.solution(exact.solve(form.problem)))
    solution, found = exact_gradients(form, weights)
    presses = solution.nu[:, form.row_map.own_p :]
    assert (presses > 1e-3).any()
    assert (presses < -1e-3).any()
    step = torch.zeros_like(parameters[lower])
    step[..., equal] = weigh({"": step})[""][..., equal]
    moved = [
        loss(kind, parameters | {name: parameters[name] + s * step for name in (lower, upper)}, weights)
        for s in (1e-5, -1e-5)
    ]
    both = ((found[lower] + found[upper]) * step).sum().item()
    assert both == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-7, abs=1e-7)
    # A side alone can move outwards only. Its row is then two inequalities, of which the other side's is inactive
    # or, if that is the one that presses, still active: then nothing changes.
    for name, outwards in ((lower, -1.0), (upper, 1.0)):
        out = torch.zeros_like(step)
        out[..., equal] = outwards * step[..., equal].abs()
        at = [loss(kind, parameters | {name: parameters[name] + k * 1e-4 * out}, weights) for k in range(4)]
        forward = (-11 * at[0] + 18 * at[1] - 9 * at[2] + 2 * at[3]) / 6e-4
        assert (found[name] * out).sum().item() == pytest.approx(forward, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("is_equal", [False, True])
@pytest.mark.parametrize(("kind", "batched"), CASES)
def test_gradients_agree_with_autograd_through_the_conversion(
    kind: str, batched: frozenset[str], is_equal: bool
) -> None:
    parameters = {k: t.requires_grad_() for k, t in DRAW[kind](4, batched, equal=is_equal).items()}
    canonical, row_map = (with_bounds if kind == "qp" else with_two_sided)(**parameters)  # type: ignore[operator]
    form = parse(kind, parameters)
    problem, g = form.problem, torch.Generator().manual_seed(9)
    count = problem.batch_size or 1
    solution = Solution(
        z=randn(g, count, N), nu=randn(g, count, problem.p), lam=randn(g, count, problem.m), s=tensor([])
    )
    adjoint = Adjoint(z=randn(g, count, N), nu=randn(g, count, problem.p), mu=randn(g, count, problem.m))
    names = list(problem.parameters())
    formed = gradients(solution, adjoint, wrt=names, batched=[name for name in names if problem.is_batched(name)])
    outputs = [t for t in canonical if t is not None]
    pulled = torch.autograd.grad(outputs, list(parameters.values()), [formed[name] for name in names])
    wanted = dict(zip(parameters, pulled, strict=True))
    found = form.gradients(solution, adjoint, form.names)
    lower, upper = ("lb", "ub") if kind == "qp" else ("l", "u")
    for name in parameters:
        if name not in (lower, upper):
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-12, atol=1e-12)
        else:
            apart = torch.ones(row_map.size, dtype=torch.bool).index_fill(0, row_map.equal, False)
            torch.testing.assert_close(found[name][..., apart], wanted[name][..., apart], rtol=1e-12, atol=1e-12)
    if parameters[lower].shape == parameters[upper].shape:
        torch.testing.assert_close(found[lower] + found[upper], wanted[lower] + wanted[upper], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "batched"), CASES)
def test_tangents_are_the_change_of_the_canonical_problem(kind: str, batched: frozenset[str]) -> None:
    parameters = DRAW[kind](6, batched, equal=True)
    form = parse(kind, parameters)
    tangents = weigh(parameters)
    lower, upper = ("lb", "ub") if kind == "qp" else ("l", "u")
    equal = form.row_map.equal
    tangents[lower][..., equal] = tangents[upper][..., equal] = 0.5
    tangents |= {name: 0.01 * tangents[name] for name in (lower, upper)}
    moved = parse(kind, {name: t + tangents[name] for name, t in parameters.items()}).problem
    found = form.tangents(tangents)
    assert found.keys() == form.problem.parameters().keys()
    for name, before in form.problem.parameters().items():
        change = getattr(moved, name) - before
        assert found[name].shape == before.shape
        torch.testing.assert_close(found[name], torch.where(before.isinf(), 0.0, change), rtol=1e-12, atol=1e-13)
    only = form.tangents({"q": tangents["q"]})
    assert only.keys() == {"q"}


@pytest.mark.parametrize(("kind", "batched"), CASES)
def test_upstream_is_the_transpose_of_solution_tangents(kind: str, batched: frozenset[str]) -> None:
    form = parse(kind, DRAW[kind](6, batched, equal=True))
    at = exact.solve(form.problem)
    g = torch.Generator().manual_seed(3)
    moved = Solution(**{name: randn(g, *block.shape) for name, block in at.blocks().items()})
    blocks = form.solution_tangents(moved, at)
    assert blocks.keys() == form.block_sizes.keys() == form.solution(at).keys()
    cotangents = {name: randn(g, 2, *block.shape) for name, block in blocks.items()}
    pulled = form.upstream(cotangents, at)
    left = sum((cotangents[k] * blocks[k]).flatten(1).sum(1) for k in blocks)
    right = sum((pulled[k] * moved.blocks()[k]).flatten(1).sum(1) for k in pulled)
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "batched"), CASES)
def test_point_undoes_solution(kind: str, batched: frozenset[str]) -> None:
    form = parse(kind, DRAW[kind](6, batched, equal=True))
    at = exact.solve(form.problem)
    blocks = form.solution(at)
    for given in (blocks, {name: t for name, t in blocks.items() if name != "s"}):
        for name, block in form.point(given).blocks().items():
            torch.testing.assert_close(block, at.blocks()[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "batched"), CASES)
def test_the_callers_adjoint_holds_the_gradients_of_its_vectors(kind: str, batched: frozenset[str]) -> None:
    form = parse(kind, DRAW[kind](6, batched, equal=True))
    at = exact.solve(form.problem)
    adjoint = exact.differentiate(form.problem, at, form.upstream(weigh(form.solution(at)), at))
    found = form.adjoint(adjoint, at)
    grads = form.gradients(at, adjoint, form.names)

    def total(name: str, block: Tensor) -> Tensor:
        return block if name in form.batched or form.batch_size is None else block.sum(0)

    if kind == "qp":
        wanted = {"q": found["z"], "b": -found["nu"], "h": -found["mu"], "lb": found["mu_lb"], "ub": -found["mu_ub"]}
    else:
        y = form.solution(at)["y"]
        wanted = {"q": found["x"], "u": -found["y"] * (y > 0), "l": -found["y"] * (y < 0)}
    for name, block in wanted.items():
        torch.testing.assert_close(grads[name], total(name, block), rtol=1e-12, atol=1e-12)


def test_k_cotangents_give_k_gradients() -> None:
    form = parse("qp", bounded(11, frozenset({"q", "lb"})))
    at = exact.solve(form.problem)
    weights = [weigh(form.solution(at), seed) for seed in (1, 2)]
    together = form.upstream({name: torch.stack([w[name] for w in weights]) for name in weights[0]})
    singles = [exact.differentiate(form.problem, at, form.upstream(w)) for w in weights]
    for name in together:
        for i, w in enumerate(weights):
            torch.testing.assert_close(together[name][i], form.upstream(w)[name], rtol=0, atol=0)
    stacked = Adjoint(**{k: torch.stack([a.blocks()[k] for a in singles]) for k in ("z", "nu", "mu")})
    found = form.gradients(at, stacked, form.names)
    blocks = form.adjoint(stacked, at)
    for i, single in enumerate(singles):
        for name, gradient in form.gradients(at, single, form.names).items():
            torch.testing.assert_close(found[name][i], gradient, rtol=1e-13, atol=1e-13)
        for name, block in form.adjoint(single, at).items():
            torch.testing.assert_close(blocks[name][i], block, rtol=0, atol=0)


EYE = torch.eye(3, dtype=torch.float64)


def test_infinite_bounds_are_dropped_and_partly_infinite_ones_do_not_bind() -> None:
    form = parse("qp", {"Q": EYE, "q": tensor([1.0, 1, 1]), "lb": tensor([[-INF, -2, 0], [-INF, -INF, 0]])})
    problem = form.problem
    torch.testing.assert_close(problem.G, -EYE[1:], rtol=0, atol=0)
    torch.testing.assert_close(problem.h, tensor([[2.0, -0.0], [INF, -0.0]]), rtol=0, atol=0)
    assert problem.A is None
    assert form.block_sizes == {"z": 3, "nu": 0, "lam": 0, "s": 0, "lam_lb": 3}
    blocks = form.solution(exact.solve(problem))
    torch.testing.assert_close(blocks["z"], tensor([[-1.0, -1, 0], [-1, -1, 0]]))
    torch.testing.assert_close(blocks["lam_lb"], tensor([[0.0, 0, 1], [0, 0, 1]]))


@pytest.mark.parametrize("kind", ["qp", "qp_two_sided"])
def test_the_batch_of_bounds_that_never_bind_is_kept(kind: str) -> None:
    free = torch.full((4, 3), INF, dtype=torch.float64)
    q = tensor([1.0, 2, 3])
    parameters = {"Q": EYE, "q": q, "ub": free} if kind == "qp" else {"P": EYE, "q": q, "A": EYE, "u": free, "l": -free}
    form = parse(kind, parameters)
    assert (form.problem.m, form.problem.batch_size, form.batch_size) == (0, 4, 4)
    assert form.batched == ({"ub"} if kind == "qp" else {"l", "u"})
    at = exact.solve(form.problem)
    z = form.solution(at)["z" if kind == "qp" else "x"]
    torch.testing.assert_close(z, -q.expand(4, 3))
    weights = {"z" if kind == "qp" else "x": torch.ones_like(z)}
    found = exact_gradients(form, weights)[1]
    torch.testing.assert_close(found["q"], torch.full((3,), -4.0, dtype=torch.float64))
    assert found["ub" if kind == "qp" else "u"].tolist() == [[0.0] * 3] * 4


def test_parameters_without_rows_are_left_out() -> None:
    form = parse("qp", {"Q": EYE, "q": EYE[0], "G": tensor([]), "h": tensor([]), "A": EYE[:0], "b": tensor([])})
    assert form.names == ("Q", "q")
    assert parse("qp_two_sided", {"P": EYE, "q": EYE[0], "A": EYE[:0]}).names == ("P", "q")
    one_sided = parse("qp_two_sided", {"P": EYE, "q": EYE[0], "A": EYE, "u": EYE[0]})
    assert (one_sided.problem.m, one_sided.problem.p) == (3, 0)


def test_without_bounds_the_problem_is_the_callers_own_tensors() -> None:
    parameters = {"Q": EYE, "q": EYE[0], "G": EYE, "h": tensor([1.0, INF, 2])}
    problem = parse("qp", parameters).problem
    assert all(getattr(problem, name) is t for name, t in parameters.items())


def test_float32_stays_float32() -> None:
    form = parse("qp", {k: t.float() for k, t in bounded(1, frozenset({"lb"}), equal=True).items()})
    assert {t.dtype for t in form.problem.parameters().values()} == {torch.float32}
    cotangents = {"lam_ub": torch.ones(B, N)}
    at = exact.solve(parse("qp", bounded(1, frozenset({"lb"}), equal=True)).problem)
    assert {t.dtype for t in form.upstream(cotangents, at).values()} == {torch.float32}


def test_at_a_multiplier_of_zero_both_sides_of_a_fixed_variable_share_the_gradient() -> None:
    form = parse("qp", {"Q": EYE, "q": tensor([0.0, 0, 0]), "lb": tensor([0.0, -1, -1]), "ub": tensor([0.0, 1, 1])})
    found = exact_gradients(form, {"z": tensor([1.0, 0, 0])})[1]
    assert (found["lb"].tolist(), found["ub"].tolist()) == ([0.5, 0.0, 0.0], [0.5, 0.0, 0.0])


BASE = {"Q": EYE, "q": tensor([1.0, 2, 3])}
OSQP = {"P": EYE, "q": tensor([1.0, 2, 3]), "A": EYE}
WRONG = {
    "kind": ("lp", BASE, r"problem\.kind: found 'lp', wanted one of qp, qp_two_sided"),
    "unknown": (
        "qp",
        BASE | {"P": EYE},
        r"problem\.P: found an unknown parameter, wanted one of Q, q, G, h, A, b, lb, ub",
    ),
    "unknown-osqp": (
        "qp_two_sided",
        OSQP | {"Q": EYE},
        r"problem\.Q: found an unknown parameter, wanted one of P, q",
    ),
    "q-missing": ("qp", {"Q": EYE}, r"problem\.q: found nothing, wanted a tensor of shape \(n,\) or \(B, n\)"),
    "q-missing-two-sided": ("qp_two_sided", {"P": EYE}, r"problem\.q: found nothing, wanted a tensor of shape \(n,\)"),
    "lb-size": ("qp", BASE | {"lb": tensor([1.0])}, r"problem\.lb: found shape \(1,\), wanted \(3,\) or \(B, 3\)"),
    "lb-dtype": (
        "qp",
        BASE | {"lb": torch.ones(3)},
        r"problem\.lb: found dtype torch\.float32, wanted dtype torch\.float64",
    ),
    "ub-batch": (
        "qp",
        BASE | {"lb": torch.zeros(2, 3).double(), "ub": torch.ones(4, 3).double()},
        r"problem\.ub: found a batch of 4, wanted 2, as problem\.lb has, or no batch dimension",
    ),
    "ub-empty-batch": ("qp", BASE | {"ub": torch.ones(0, 3).double()}, r"problem\.ub: found a batch of 0"),
    "lb-nan": (
        "qp",
        BASE | {"lb": tensor([0.0, torch.nan, 0])},
        r"problem\.lb: found nan at \[1\], wanted finite numbers or -inf",
    ),
    "lb-inf": (
        "qp",
        BASE | {"lb": tensor([0.0, 0, INF])},
        r"problem\.lb: found inf at \[2\], wanted finite numbers or -inf",
    ),
    "ub-inf": (
        "qp",
        BASE | {"ub": tensor([-INF, 0, 0])},
        r"problem\.ub: found -inf at \[0\], wanted finite numbers or",
    ),
    "h-inf": (
        "qp",
        BASE | {"G": EYE, "h": tensor([0.0, -INF, 0])},
        r"problem\.h: found -inf at \[1\], wanted finite numbers or \+inf",
    ),
    "Q-nan": ("qp", BASE | {"Q": EYE * torch.nan}, r"problem\.Q: found nan at \[0, 0\], wanted finite numbers$"),
    "P-nan": ("qp_two_sided", OSQP | {"P": EYE * torch.nan, "u": EYE[0]}, r"problem\.P: found nan at \[0, 0\]"),
    "l-inf": (
        "qp_two_sided",
        OSQP | {"l": tensor([0.0, INF, 0])},
        r"problem\.l: found inf at \[1\], wanted finite numbers or -inf",
    ),
    "u-inf": (
        "qp_two_sided",
        OSQP | {"u": tensor([0.0, -INF, 0])},
        r"problem\.u: found -inf at \[1\], wanted finite numbers or \+inf",
    ),
    "crossed": (
        "qp",
        BASE | {"lb": tensor([0.0, 2, 0]), "ub": tensor([[3.0, 3, 3], [3, 1.5, 3]])},
        r"problem\.lb: found 2\.0 > ub = 1\.5 at \[1, 1\], wanted lb <= ub",
    ),
    "crossed-osqp": (
        "qp_two_sided",
        OSQP | {"l": tensor([0.0, 0, 1]), "u": tensor([0.0, 1, 0.5])},
        r"problem\.l: found 1\.0 > u = 0\.5 at \[2\], wanted l <= u",
    ),
    "A-missing": ("qp_two_sided", BASE | {"P": EYE, "u": EYE[0]}, r"problem\.Q: found an unknown"),
    "rows-missing": (
        "qp_two_sided",
        {"P": EYE, "q": EYE[0], "l": EYE[0]},
        r"problem\.A: found nothing, wanted a tensor, as problem\.l is given",
    ),
    "sides-missing": ("qp_two_sided", OSQP, r"problem\.u: found nothing, wanted a tensor, as problem\.A is given"),
    "sides-differ": (
        "qp_two_sided",
        OSQP | {"l": tensor([0.0, 0, 0]), "u": tensor([1.0, 1])},
        r"problem\.u: found shape \(2,\), wanted \(3,\) or \(B, 3\)",
    ),
}


@pytest.mark.parametrize(("kind", "parameters", "message"), WRONG.values(), ids=WRONG)
def test_problems_that_do_not_fit_are_named_in_the_callers_words(
    kind: str, parameters: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ProblemError, match=message):
        parse(kind, parameters)


@pytest.fixture
def form() -> Form:
    """n = 5, m = 2, p = 1, B = 3, variables 3 and 4 fixed."""
    return parse("qp", bounded(6, frozenset({"q"}), equal=True))


def double(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.float64)


UPSTREAM = {
    "none": ({}, r"upstream: found no cotangent, wanted at least one of z, nu, lam, s, lam_lb, lam_ub"),
    "name": ({"x": double(3, 5)}, r"upstream: found 'x', wanted one of z, nu, lam, s, lam_lb, lam_ub"),
    "unbatched": ({"z": double(5)}, r"upstream\.z: found shape \(5,\), wanted \(3, 5\) or \(k, 3, 5\)"),
    "size": ({"z": double(3, 4)}, r"upstream\.z: found shape \(3, 4\), wanted \(3, 5\) or \(k, 3, 5\)"),
    "rank": ({"z": double(1, 1, 3, 5)}, r"upstream\.z: found shape \(1, 1, 3, 5\), wanted \(3, 5\) or \(k, 3, 5\)"),
    "no-k": ({"z": double(0, 3, 5)}, r"upstream\.z: found 0 cotangents, wanted at least one"),
    "k-differs": (
        {"z": double(2, 3, 5), "lam": double(4, 3, 2)},
        r"upstream\.lam: found shape \(4, 3, 2\), wanted \(2, 3, 2\), as upstream\.z has shape \(2, 3, 5\)",
    ),
    "dtype": (
        {"z": torch.ones(3, 5)},
        r"upstream\.z: found dtype torch\.float32, wanted dtype torch\.float64",
    ),
    "fixed": (
        {"lam_lb": double(3, 5)},
        r"upstream\.lam_lb: found a cotangent, and variables with lb = ub \[3, 4\], wanted rows of A for them",
    ),
}


@pytest.mark.parametrize(("cotangents", "message"), UPSTREAM.values(), ids=UPSTREAM)
def test_wrong_cotangents(form: Form, cotangents: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        form.upstream(cotangents)


def test_cotangents_may_hold_anything_and_empty_ones_are_ignored() -> None:
    form = parse("qp", BASE)
    found = form.upstream({"z": EYE[0] * torch.nan, "nu": tensor([])})
    assert found.keys() == {"z"}
    assert found["z"].shape == (1, 3)


TANGENTS = {
    "none": ({}, r"tangents: found no tangent, wanted at least one of Q, q, G, h, A, b, lb, ub"),
    "name": ({"P": double(5, 5)}, r"tangents: found 'P', wanted one of Q, q, G, h, A, b, lb, ub"),
    "shape": ({"q": double(5)}, r"tangents\.q: found shape \(5,\), wanted \(3, 5\), as problem\.q has"),
    "dtype": ({"h": torch.ones(2)}, r"tangents\.h: found dtype torch\.float32, wanted dtype torch"),
    "nan": ({"h": double(2) * torch.nan}, r"tangents\.h: found nan at \[0\], wanted finite numbers"),
    "apart": (
        {"lb": double(5)},
        r"tangents\.lb: found other values than tangents\.ub at \[3\], where lb = ub, wanted the same there",
    ),
}


@pytest.mark.parametrize(("tangents", "message"), TANGENTS.values(), ids=TANGENTS)
def test_wrong_tangents(form: Form, tangents: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        form.tangents(tangents)


POINT = {
    "name": ({"x": double(3, 5)}, r"warm_start: found 'x', wanted one of z, nu, lam, s, lam_lb, lam_ub"),
    "missing": ({"nu": None}, r"warm_start\.nu: found nothing, wanted a tensor of shape \(3, 1\)"),
    "missing-bound": ({"lam_ub": None}, r"warm_start\.lam_ub: found nothing, wanted a tensor of shape \(3, 5\)"),
    "shape": ({"z": double(2, 3, 5)}, r"warm_start\.z: found shape \(2, 3, 5\), wanted \(3, 5\)"),
    "dtype": ({"lam": torch.ones(3, 2)}, r"warm_start\.lam: found dtype torch\.float32, wanted dtype torch"),
    "nan": ({"z": double(3, 5) * torch.nan}, r"warm_start\.z: found nan at \[0, 0\], wanted finite numbers"),
    "lam-inf": ({"lam": double(3, 2) * INF}, r"warm_start\.lam: found inf at \[0, 0\], wanted finite numbers"),
    "s-nan": ({"s": double(3, 2) * torch.nan}, r"warm_start\.s: found nan at \[0, 0\], wanted finite numbers or \+inf"),
}


@pytest.mark.parametrize(("change", "message"), POINT.values(), ids=POINT)
def test_wrong_points(form: Form, change: dict[str, Tensor | None], message: str) -> None:
    blocks = {name: double(3, size) for name, size in form.block_sizes.items()}
    given = {name: t for name, t in (blocks | change).items() if t is not None}
    with pytest.raises(ProblemError, match=message):
        form.point(given, section="warm_start")


def test_the_slack_of_a_free_row_may_be_infinite() -> None:
    form = parse("qp", BASE | {"G": EYE[:1], "h": tensor([INF])})
    point = form.point({"z": EYE[0], "lam": tensor([0.0]), "s": tensor([INF])})
    assert point.s.tolist() == [[INF]]
    assert point.nu.shape == (1, 0)


def test_gradients_of_other_names_are_refused(form: Form) -> None:
    at = exact.solve(form.problem)
    adjoint = exact.differentiate(form.problem, at, {"z": at.z})
    with pytest.raises(ProblemError, match=r"wrt: found 'P', wanted one of Q, q, G, h, A, b, lb, ub"):
        form.gradients(at, adjoint, ["q", "P"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", DRAW)
def test_a_form_on_a_gpu_gives_what_it_gives_on_the_cpu(kind: str) -> None:
    parameters = DRAW[kind](11, frozenset({"q"}), equal=True)
    form = parse(kind, parameters)
    on_gpu = parse(kind, {name: t.cuda() for name, t in parameters.items()})
    at = exact.solve(form.problem)
    weights = weigh(form.solution(at))
    adjoint = exact.differentiate(form.problem, at, form.upstream(weights, at))
    wanted = form.gradients(at, adjoint, form.names)
    moved = Solution(**{name: t.cuda() for name, t in at.blocks().items()})
    found = on_gpu.gradients(moved, Adjoint(**{name: t.cuda() for name, t in adjoint.blocks().items()}), form.names)
    for name, gradient in wanted.items():
        assert found[name].is_cuda
        torch.testing.assert_close(found[name].cpu(), gradient, rtol=1e-12, atol=1e-12)
    for name, block in on_gpu.solution(moved).items():
        torch.testing.assert_close(block.cpu(), form.solution(at)[name], rtol=0, atol=0)
    found = on_gpu.upstream({name: t.cuda() for name, t in weights.items()}, moved)
    for name, block in form.upstream(weights, at).items():
        torch.testing.assert_close(found[name].cpu(), block, rtol=0, atol=0)
