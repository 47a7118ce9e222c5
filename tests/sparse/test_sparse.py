"""Sparse problems through the client: solutions, gradients on the pattern, states, failures."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch.autograd import forward_ad

import argrad
from argrad.problems import parse
from tests.sparse.problems import MATRICES, NAMES, csr, dense, draw, moved, parts, tensors, tracked, values_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

BLOCKS = ("z", "nu", "lam", "s")


def weights(problem, seed=7):
    rng = np.random.default_rng(seed)
    sizes = {"z": len(problem["q"]), "nu": len(problem["b"]), "lam": len(problem["h"]), "s": len(problem["h"])}
    return {name: torch.from_numpy(rng.normal(size=size)) for name, size in sizes.items()}


def loss(solution, w):
    return sum((getattr(solution, name) * w[name]).sum() for name in BLOCKS)


def on_pattern(gradient, matrix):
    """Entries of a dense gradient where a SciPy matrix stores any."""
    coo = matrix.tocoo()
    return gradient[torch.from_numpy(coo.row).long(), torch.from_numpy(coo.col).long()]


@pytest.mark.parametrize("gradients", ["adjoint", "full"])
@pytest.mark.parametrize("solver", ["auto", "clarabel", "osqp"])
def test_solution_and_gradients_are_those_of_the_dense_problem(client, solver, gradients):
    problem, options = draw(), argrad.Options(solver=solver)
    w = weights(problem)
    ours, theirs = tracked(tensors(problem)), tracked(dense(problem))
    found = argrad.solve_qp(client, **ours, options=options, gradients=gradients)
    reference = argrad.solve_qp(client, **theirs)
    for name in BLOCKS:
        torch.testing.assert_close(getattr(found, name), getattr(reference, name), rtol=1e-9, atol=1e-9)
    loss(found, w).backward()
    loss(reference, w).backward()
    for name in NAMES:
        gradient = ours[name].grad
        assert gradient.layout == ours[name].layout
        wanted = theirs[name].grad
        if name in MATRICES:
            torch.testing.assert_close(gradient.crow_indices(), ours[name].crow_indices())
            torch.testing.assert_close(gradient.col_indices(), ours[name].col_indices())
            wanted = on_pattern(wanted, problem[name])
        torch.testing.assert_close(values_of(gradient), wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_agrees_with_central_differences(local, name):
    problem = draw(seed=3)
    w, given = weights(problem), tensors(problem)
    leaves = tracked(given)
    loss(argrad.solve_qp(local, **leaves), w).backward()
    direction = torch.from_numpy(np.random.default_rng(1).normal(size=values_of(given[name]).shape))
    ahead, behind = (loss(argrad.solve_qp(local, **moved(given, name, direction, e)), w) for e in (1e-6, -1e-6))
    analytic = (values_of(leaves[name].grad) * direction).sum()
    assert ((ahead - behind) / 2e-6).item() == pytest.approx(analytic.item(), rel=1e-6)


def test_gradients_flow_to_the_values_that_a_sparse_tensor_was_made_of(local):
    given = tensors(draw())
    values = given["G"].values().clone().requires_grad_()
    G = torch.sparse_csr_tensor(
        given["G"].crow_indices(), given["G"].col_indices(), values, given["G"].shape, check_invariants=True
    )
    leaf = given["G"].detach().requires_grad_()
    argrad.solve_qp(local, **given | {"G": G}).z.sum().backward()
    argrad.solve_qp(local, **given | {"G": leaf}).z.sum().backward()
    torch.testing.assert_close(values.grad, leaf.grad.values())


def test_coo_and_dense_matrices_beside_sparse_ones(local):
    problem = draw()
    given = tensors(problem)
    coo, full = given["Q"].to_sparse_coo().requires_grad_(), given["A"].to_dense().requires_grad_()
    leaves = tracked(given)
    argrad.solve_qp(local, **given | {"Q": coo, "A": full}).z.sum().backward()
    argrad.solve_qp(local, **leaves).z.sum().backward()
    torch.testing.assert_close(coo.grad.to_dense(), leaves["Q"].grad.to_dense())
    torch.testing.assert_close(on_pattern(full.grad, problem["A"]), leaves["A"].grad.values())


def test_layer_takes_sparse_tensors(local):
    layer = argrad.nn.QPLayer(local)
    leaves = tracked(tensors(draw()))
    layer(*(leaves[name] for name in NAMES)).sum().backward()
    assert leaves["Q"].grad.layout == torch.sparse_csr


@pytest.mark.parametrize("kept", [True, False], ids=["state", "stateless"])
def test_k_cotangents_on_every_block_by_state_and_without(client, kept):
    problem = draw(seed=5)
    result = client.solve(argrad.QP(**tensors(problem)), keep_state=kept)
    assert (result.state is not None) == kept
    rng = np.random.default_rng(0)
    upstream = {name: torch.from_numpy(rng.normal(size=(3, *result.solution[name].shape))) for name in BLOCKS}
    found = client.vjp(result, upstream)
    reference = client.solve(argrad.QP(**dense(problem)), upstream=upstream).gradients
    for name in NAMES:
        wanted = reference[name]
        if name in MATRICES:
            assert found.gradients[name].layout == torch.sparse_csr
            wanted = torch.stack([on_pattern(one, problem[name]) for one in wanted])
        torch.testing.assert_close(values_of(found.gradients[name]), wanted, rtol=1e-8, atol=1e-8)
    client.release(result)


def test_upstream_in_the_solve_with_adjoint_reply(client):
    problem = draw(seed=6)
    upstream = {"z": torch.ones(len(problem["q"]), dtype=torch.float64)}
    found = client.solve(parse("sparse_qp", parts(problem)), upstream=upstream, gradients="adjoint")
    wanted = client.solve(argrad.QP(**dense(problem)), upstream=upstream, gradients="adjoint").adjoint
    assert found.adjoint.keys() == wanted.keys()
    for name, block in wanted.items():
        torch.testing.assert_close(found.adjoint[name], block, rtol=1e-8, atol=1e-8)


def test_parts_have_gradients_by_their_own_names(local):
    problem = draw()
    upstream = {"z": torch.ones(len(problem["q"]), dtype=torch.float64)}
    named = local.solve(argrad.QP(**tensors(problem)), upstream=upstream, wrt=["Q", "q"])
    found = local.solve(parse("sparse_qp", parts(problem)), upstream=upstream, wrt=["Q_values", "q"])
    assert set(found.gradients) == {"Q_values", "q"}
    assert set(named.gradients) == {"Q", "q"}
    torch.testing.assert_close(found.gradients["Q_values"], named.gradients["Q"].values())


def test_bpqp_gives_what_kkt_gives(local):
    leaves, others = (tracked(tensors(draw())) for _ in range(2))
    argrad.solve_qp(local, **leaves, options=argrad.Options(method="bpqp")).z.sum().backward()
    argrad.solve_qp(local, **others, options=argrad.Options(method="kkt")).z.sum().backward()
    for name in NAMES:
        torch.testing.assert_close(values_of(leaves[name].grad), values_of(others[name].grad))


def test_jvp_is_the_transpose_of_vjp(client):
    problem = draw(seed=8)
    result = client.solve(argrad.QP(**tensors(problem)))
    rng = np.random.default_rng(2)
    upstream = {name: torch.from_numpy(rng.normal(size=result.solution[name].shape)) for name in BLOCKS}
    tangents = {}
    for name, value in tensors(problem).items():
        step = torch.from_numpy(rng.normal(size=values_of(value).shape))
        zero = moved({name: value}, name, -values_of(value), 1.0)
        tangents[name] = moved(zero, name, step, 1.0)[name]
    forward = client.jvp(result, tangents).tangents
    backward = client.vjp(result, upstream).gradients
    pushed = sum((forward[name] * upstream[name]).sum() for name in BLOCKS)
    pulled = sum((values_of(backward[name]) * values_of(tangents[name])).sum() for name in NAMES)
    assert pushed.item() == pytest.approx(pulled.item(), rel=1e-9)


def test_forward_mode_through_autograd(local):
    given = tensors(draw())
    direction = torch.ones_like(given["q"])
    with forward_ad.dual_level():
        q = forward_ad.make_dual(given["q"], direction)
        pushed = forward_ad.unpack_dual(argrad.solve_qp(local, **given | {"q": q}).z).tangent
    ahead, behind = (argrad.solve_qp(local, **given | {"q": given["q"] + e * direction}).z for e in (1e-6, -1e-6))
    torch.testing.assert_close(pushed, (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-6)


def test_second_derivatives_and_vmap_are_refused(local):
    leaves = tracked(tensors(draw()))
    (gradient,) = torch.autograd.grad(argrad.solve_qp(local, **leaves).z.sum(), leaves["q"], create_graph=True)
    with pytest.raises(argrad.GradientError, match="first derivatives only"):
        gradient.sum().backward()
    given = tensors(draw())
    with pytest.raises(argrad.GradientError, match="solved alone"):
        torch.func.vmap(lambda q: argrad.solve_qp(local, **given | {"q": q}).z)(given["q"].expand(2, -1))


def test_float32_is_solved_in_float64(local):
    problem = draw()
    single = {name: tensor.to(torch.float32) for name, tensor in tensors(problem).items()}
    found = argrad.solve_qp(local, **single)
    assert found.z.dtype == torch.float32
    torch.testing.assert_close(found.z.double(), argrad.solve_qp(local, **tensors(problem)).z, rtol=1e-4, atol=1e-4)


def test_rows_that_do_not_bind_and_absent_blocks(local):
    problem = draw()
    problem["h"][::2] = np.inf
    full = argrad.solve_qp(local, **dense(problem))
    found = argrad.solve_qp(local, **tensors(problem))
    torch.testing.assert_close(found.z, full.z, rtol=1e-9, atol=1e-9)
    assert torch.isinf(found.s[::2]).all()
    alone = argrad.solve_qp(local, csr(problem["Q"]), torch.from_numpy(problem["q"]))
    wanted = np.linalg.solve(problem["Q"].toarray(), -problem["q"])
    np.testing.assert_allclose(alone.z, wanted, atol=1e-10)
    some = {name: tensors(problem)[name] for name in ("Q", "q", "A", "b")}
    others = {name: dense(problem)[name] for name in ("Q", "q", "A", "b")}
    torch.testing.assert_close(argrad.solve_qp(local, **some).z, argrad.solve_qp(local, **others).z)


def test_linear_program_has_an_exact_vertex_and_its_derivatives(local):
    # minimise x + 2y subject to x + y ≥ 1, x, y ≥ 0: x = 1, y = 0.
    G = sp.csr_matrix(np.array([[-1.0, -1.0], [-1.0, 0.0], [0.0, -1.0]]))
    c, h = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([-1.0, 0.0, 0.0], dtype=torch.float64)
    c.requires_grad_()
    h.requires_grad_()
    found = argrad.solve_qp(local, None, c, csr(G), h)
    torch.testing.assert_close(found.z.detach(), torch.tensor([1.0, 0.0], dtype=torch.float64))
    found.z[0].backward()
    torch.testing.assert_close(c.grad, torch.zeros_like(c))
    torch.testing.assert_close(h.grad, torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("solver", ["clarabel", "osqp"])
@pytest.mark.parametrize("status", ["infeasible", "unbounded", "nonconvex"])
def test_problems_without_a_solution_say_why(local, solver, status):
    rows = {"infeasible": [[1.0, 0.0], [-1.0, 0.0]], "unbounded": [[1.0, 0.0], [0.0, 1.0]]}.get(status, [[1.0, 1.0]])
    Q = {"infeasible": np.eye(2), "unbounded": np.diag([1.0, 0.0]), "nonconvex": np.array([[1.0, 2.0], [2.0, 1.0]])}
    h = {"infeasible": [0.0, -1.0], "unbounded": [1.0, 1.0]}.get(status, [1.0])
    problem = {
        "Q": csr(sp.csr_matrix(Q[status])),
        "q": torch.ones(2, dtype=torch.float64),
        "G": csr(sp.csr_matrix(np.array(rows))),
        "h": torch.tensor(h, dtype=torch.float64),
    }
    result = local.solve(argrad.QP(**problem), options=argrad.Options(solver=solver), check=False)
    assert result.statuses == (status,)
    with pytest.raises(argrad.SolveError, match=status):
        argrad.solve_qp(local, **problem)
    refused = local.vjp(result, {"z": torch.ones(2, dtype=torch.float64)}, check=False)
    assert refused.gradient_statuses == (status,)
    q = problem["q"].clone().requires_grad_()
    for choice, filler in (("nan", float("nan")), ("zero_grad", 0.0)):
        q.grad = None
        argrad.solve_qp(local, **problem | {"q": q}, on_failure=choice).z.nansum().backward()
        torch.testing.assert_close(q.grad, torch.full_like(q.grad, filler), equal_nan=True)


def small(h, rows, Q=None):
    G = np.array(rows)
    n = G.shape[1]
    return {
        "Q": csr(sp.csr_matrix(np.eye(n) if Q is None else np.array(Q))),
        "q": -torch.ones(n, dtype=torch.float64),
        "G": csr(sp.csr_matrix(G)),
        "h": torch.tensor(h, dtype=torch.float64),
    }


def test_weakly_active_rows_are_dropped_and_flagged(local):
    problem = small([1.0, 5.0], [[1.0, 0.0], [0.0, 1.0]])  # z = (1, 1): the first row only touches
    result = local.solve(argrad.QP(**problem))
    assert argrad.Flag.DEGENERATE in result.report.flags[0]
    found = local.vjp(result, {"z": torch.tensor([1.0, 0.0], dtype=torch.float64)})
    assert found.gradient_statuses == ("ok",)
    torch.testing.assert_close(found.gradients["q"], torch.tensor([-1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(found.gradients["h"], torch.zeros(2, dtype=torch.float64))


def test_dependent_rows_are_flagged_and_cotangents_on_them_refused(local):
    problem = small([0.5, 0.5], [[1.0, 0.0], [1.0, 0.0]])
    result = local.solve(argrad.QP(**problem))
    ones = torch.ones(2, dtype=torch.float64)
    found = local.vjp(result, {"z": ones})
    assert argrad.Flag.DEPENDENT in found.report.flags[0]
    torch.testing.assert_close(found.gradients["h"].sum(), ones[0])
    assert local.vjp(result, {"lam": ones}, check=False).gradient_statuses == ("dependent",)


def test_a_solution_that_is_not_unique_has_no_gradient(local):
    problem = small([1.0, 1.0], [[1.0, 0.0], [-1.0, 0.0]], Q=[[1.0, 0.0], [0.0, 0.0]])
    problem["q"] = torch.tensor([-1.0, 0.0], dtype=torch.float64)
    result = local.solve(argrad.QP(**problem))
    found = local.vjp(result, {"z": torch.ones(2, dtype=torch.float64)}, check=False)
    assert found.gradient_statuses == ("nonunique",)
    assert argrad.Flag.NONUNIQUE in found.report.flags[0]


def test_lost_state_costs_a_resend_and_no_answer(local):
    leaves, others = tracked(tensors(draw())), tracked(tensors(draw()))
    z = argrad.solve_qp(local, **leaves).z
    local._backend.close()  # forgets every state
    z.sum().backward()
    argrad.solve_qp(local, **others).z.sum().backward()
    torch.testing.assert_close(leaves["Q"].grad.values(), others["Q"].grad.values(), rtol=1e-9, atol=1e-9)
