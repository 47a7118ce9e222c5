"""Solves under autograd: gradients, what is asked and sent, failures, saved tensors."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import re
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck

import argrad
from argrad import solve_qp, solve_two_sided_qp
from argrad.client import Client
from argrad.nn import QPLayer
from tests.client.support import NAMES, D, Recorder, assert_close, draw, infeasible, simplex

# torch's own first use of forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

CASES = [
    pytest.param(None, "", id="single"),
    pytest.param(3, "QqGhAb", id="all-batched"),
    pytest.param(3, "q", id="one-batched"),
    pytest.param(2, "Ghb", id="mixed"),
]


def leaves(parameters: dict[str, Tensor], names: str | tuple[str, ...] = NAMES) -> dict[str, Tensor]:
    """The same values; those named require gradients."""
    return {name: t.detach().clone().requires_grad_(name in names) for name, t in parameters.items()}


def as_function(client: Client, parameters: dict[str, Tensor], **more: Any) -> Callable[..., Any]:
    """`solve_qp` of the parameters in order."""
    return lambda *tensors: solve_qp(client, **dict(zip(parameters, tensors, strict=True)), **more)


class TestGradients:
    @pytest.mark.parametrize("gradients", ["adjoint", "full"])
    @pytest.mark.parametrize(("batch", "batched"), CASES)
    def test_all_blocks_and_parameters(self, local: Client, batch: int | None, batched: str, gradients: str) -> None:
        parameters = leaves(draw(1, batch=batch, batched=batched, n=3, m=2))
        function = as_function(local, parameters, gradients=gradients)
        assert gradcheck(function, tuple(parameters.values()), check_forward_ad=gradients == "adjoint", atol=1e-7)

    @pytest.mark.parametrize("name", NAMES)
    def test_only_one_parameter(self, local: Client, name: str) -> None:
        parameters = draw(1, batch=2, batched="qh")
        given = leaves(parameters, (name,))
        function = as_function(local, parameters)
        assert gradcheck(lambda t: function(*(given | {name: t}).values()), (given[name],), atol=1e-7)

    @pytest.mark.parametrize("rows", ["G", "A", ""])
    def test_absent_rows(self, local: Client, rows: str) -> None:
        parameters = draw(2, batch=2, m=3 if rows == "G" else 0, p=1 if rows == "A" else 0)
        function = as_function(local, parameters)
        solution = function(*parameters.values())
        assert solution.lam.shape == solution.s.shape == (2, 3 if rows == "G" else 0)
        assert solution.nu.shape == (2, 1 if rows == "A" else 0)
        assert gradcheck(function, tuple(leaves(parameters).values()), check_forward_ad=True, atol=1e-7)

    @pytest.mark.parametrize("which", ["lb", "ub", "both"])
    def test_bounds(self, local: Client, which: str) -> None:
        parameters = draw(3, batch=2, batched="Qq", m=2)
        n = parameters["q"].shape[-1]
        lb = torch.full((n,), -0.6, dtype=D)
        lb[0] = -torch.inf
        ub = torch.linspace(0.0, 0.4, 2 * n, dtype=D).reshape(2, n)
        bounds = {"lb": lb, "ub": ub}
        given = parameters | {name: t for name, t in bounds.items() if which in (name, "both")}
        function = as_function(local, given)
        solution = function(*given.values())
        assert isinstance(solution, argrad.BoundedQPSolution)
        assert solution.lam_lb.shape == (2, 0 if which == "ub" else n)
        assert solution.lam_ub.shape == (2, 0 if which == "lb" else n)

        # Central differences cannot step from −∞.
        def finite(*tensors: Tensor) -> Any:
            named = dict(zip(given, tensors, strict=True))
            if "lb" in named:
                named["lb"] = torch.where(torch.isfinite(lb), named["lb"], lb)
            return tuple(block for block in solve_qp(local, **named) if block.numel())

        points = leaves({name: torch.nan_to_num(t, neginf=0.0) for name, t in given.items()}, tuple(given))
        assert gradcheck(finite, tuple(points.values()), atol=1e-7)

    def test_two_sided_rows(self, local: Client) -> None:
        drawn = draw(4, batch=2, batched="Qq", m=3, p=0)
        l, u = torch.tensor([-0.1, -0.4, -0.2], dtype=D), torch.tensor([0.1, 0.2, 0.5], dtype=D)
        tensors = (drawn["Q"], drawn["q"], drawn["G"], l, u)
        inputs = tuple(t.clone().requires_grad_() for t in tensors)
        assert gradcheck(lambda *t: solve_two_sided_qp(local, *t), inputs, check_forward_ad=True, atol=1e-7)

    def test_shared_parameters_get_the_sum(self, local: Client) -> None:
        shared = leaves(draw(5, batch=3, batched="q"))
        each = leaves({k: t if k == "q" else t.expand(3, *t.shape) for k, t in shared.items()})
        weights = torch.randn(3, 4, dtype=D, generator=torch.Generator().manual_seed(0))
        for parameters in (shared, each):
            (solve_qp(local, **parameters).z * weights).sum().backward()
        for name in NAMES:
            wanted = each[name].grad if name == "q" else each[name].grad.sum(0)  # type: ignore[union-attr]
            assert_close(shared[name].grad, wanted)  # type: ignore[arg-type]

    def test_an_asymmetric_q_is_its_symmetric_part(self, local: Client) -> None:
        parameters = draw(6, batch=None)
        skew = torch.triu(torch.ones(4, 4, dtype=D), 1)
        plain, skewed = leaves(parameters), leaves(parameters | {"Q": parameters["Q"] + skew - skew.mT})
        for given in (plain, skewed):
            solve_qp(local, **given).z.sum().backward()
        assert_close(skewed["Q"].grad, plain["Q"].grad)  # type: ignore[arg-type]
        assert_close(plain["Q"].grad, plain["Q"].grad.mT)  # type: ignore[arg-type,union-attr]

    def test_rows_that_do_not_bind(self, local: Client) -> None:
        parameters = simplex()
        parameters["h"][1] = torch.inf
        given = leaves(parameters, ("q", "b"))
        solution = solve_qp(local, **given)
        assert solution.s[1] == torch.inf
        solution.z[0].backward()
        assert given["q"].grad.tolist() == pytest.approx([-0.25, 0.25])  # type: ignore[union-attr]

    def test_float32(self, local: Client) -> None:
        parameters = draw(7, batch=2, batched="q")
        single = leaves({name: t.float() for name, t in parameters.items()})
        double = leaves({name: t.detach().double() for name, t in single.items()})
        for given in (single, double):
            solution = solve_qp(local, **given)
            assert {block.dtype for block in solution} == {given["q"].dtype}
            solution.z.square().sum().backward()
        for name in NAMES:
            grad = single[name].grad
            assert grad is not None
            assert grad.dtype == torch.float32
            assert_close(grad.double(), double[name].grad, 1e-5)  # type: ignore[arg-type]

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="ends where there is a GPU")
    def test_cuda_in_cuda_out(self, service_url: str) -> None:
        for client in (Client("local"), Client(service_url)):
            given = {name: t.detach().cuda().requires_grad_() for name, t in draw(8, batch=2).items()}
            solution = solve_qp(client, **given)
            assert all(block.is_cuda for block in solution)
            solution.z.sum().backward()
            assert all(t.grad is not None and t.grad.is_cuda for t in given.values())


class TestWhatIsAsked:
    def test_only_needed_gradients(self, recorder: Recorder, recorded: Client) -> None:
        given = leaves(draw(1, batch=2), ("h", "q"))
        solve_qp(recorded, **given, gradients="full").z.sum().backward()
        _, request, tensors, _ = recorder.exchanges[1]
        assert (request.wrt, request.gradients) == (["q", "h"], "full")
        assert list(tensors) == ["upstream.z"]
        assert given["G"].grad is None

    def test_the_adjoint_instead_of_matrices(self, recorder: Recorder, recorded: Client) -> None:
        given = leaves(draw(1, batch=2))
        solve_qp(recorded, **given).z.sum().backward()
        _, request, _, _ = recorder.exchanges[1]
        assert (request.wrt, request.gradients) == (None, "adjoint")
        assert all(given[name].grad.shape == given[name].shape for name in NAMES)  # type: ignore[union-attr]

    def test_only_cotangents_that_are_there(self, recorder: Recorder, recorded: Client) -> None:
        solution = solve_qp(recorded, **leaves(draw(1, batch=2)))
        (solution.z.sum() + solution.s.sum()).backward()
        assert list(recorder.exchanges[1][2]) == ["upstream.z", "upstream.s"]

    def test_nothing_is_asked_where_nothing_flows_back(self, recorder: Recorder, recorded: Client) -> None:
        given = leaves(draw(1, batch=2), ("q",))
        solution = solve_qp(recorded, **given)
        assert torch.autograd.grad(solution.z.detach().sum() + given["q"].sum(), given["q"])[0].eq(1).all()
        assert recorder.names == ["solve"]

    @pytest.mark.parametrize("mode", ["plain", "no_grad", "inference"])
    def test_without_gradients_no_state_is_kept(self, recorder: Recorder, recorded: Client, mode: str) -> None:
        context = {"plain": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]
        given = leaves(draw(1, batch=2), () if mode == "plain" else NAMES)
        with context():
            solution = solve_qp(recorded, **given)
        assert recorder.exchanges[0][1].keep_state is False
        assert not solution.z.requires_grad
        reference = weakref.ref(given.pop("Q"))
        recorder.exchanges.clear()
        gc.collect()
        assert reference() is None

    @pytest.mark.parametrize("mode", ["reverse", "forward"])
    def test_with_gradients_state_is_kept(self, recorder: Recorder, recorded: Client, mode: str) -> None:
        given = leaves(draw(1, batch=2), ("q",) if mode == "reverse" else ())
        with forward_ad.dual_level():
            if mode == "forward":
                given["q"] = forward_ad.make_dual(given["q"], torch.ones_like(given["q"]))
            solve_qp(recorded, **given)
        assert recorder.exchanges[0][1].keep_state is True
        if mode == "forward":
            assert recorder.names == ["solve", "jvp"]
            assert recorder.exchanges[1][1].state is not None
            assert list(recorder.exchanges[1][2]) == ["tangents.q"]

    def test_identifiers_and_deadline_are_those_of_the_forward(self, recorder: Recorder, recorded: Client) -> None:
        given = leaves(draw(1, batch=2), ("q",))
        for request_id in ("mine", None):
            solve_qp(recorded, **given, timeout_s=7.0, request_id=request_id).z.sum().backward()
        calls = [call for *_, call in recorder.exchanges]
        assert calls[0] == calls[1]
        assert calls[2] == calls[3]
        assert (calls[0].timeout_s, calls[0].request_id) == (7.0, "mine")
        assert calls[2].affinity != calls[0].affinity
        assert calls[2].request_id

    def test_the_state_is_let_go_with_the_graph(self, recorder: Recorder, recorded: Client) -> None:
        given = leaves(draw(1, batch=2), ("q",))
        solution = solve_qp(recorded, **given)
        solution.z.sum().backward(retain_graph=True)
        assert not recorded._released
        solution.z.sum().backward()
        del solution
        token = recorder.exchanges[1][1].state
        assert list(recorded._released) == [token]
        solve_qp(recorded, **given)
        assert recorder.released == [token]

    def test_retain_graph(self, recorder: Recorder, recorded: Client) -> None:
        given = leaves(draw(1, batch=2), ("q",))
        z = solve_qp(recorded, **given).z
        grads = [torch.autograd.grad(z.sum(), given["q"], retain_graph=True)[0] for _ in range(2)]
        assert_close(grads[0], grads[1])
        states = {request.state for name, request, *_ in recorder.exchanges if name == "vjp"}
        assert len(states) == 1
        assert None not in states

    @pytest.mark.parametrize("gradients", ["adjoint", "full"])
    def test_a_lost_state_costs_nothing_but_time(self, recorder: Recorder, recorded: Client, gradients: Any) -> None:
        given = leaves(draw(1, batch=2, batched="q"))
        z = solve_qp(recorded, **given, gradients=gradients).z
        kept = torch.autograd.grad(z.square().sum(), list(given.values()), retain_graph=True)
        recorder.forget_states()
        lost = torch.autograd.grad(z.square().sum(), list(given.values()))
        assert recorder.names == ["solve", "vjp", "vjp", "vjp"]
        for one, other in zip(kept, lost, strict=True):
            assert_close(other, one, 1e-10)

    @pytest.mark.parametrize("is_lost", [False, True], ids=["state", "stateless"])
    @pytest.mark.parametrize("edited", ["Q", "z"])
    def test_an_edit_in_place_raises_on_every_path(
        self, recorder: Recorder, recorded: Client, edited: str, is_lost: bool
    ) -> None:
        given = draw(1, batch=2)
        given["q"].requires_grad_()
        solution = solve_qp(recorded, **given)
        loss = (solution.z * 1.0).sum()
        if is_lost:
            recorder.forget_states()
        with torch.no_grad():
            (given["Q"] if edited == "Q" else solution.z).mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        assert recorder.names == ["solve"]

    def test_backward_in_another_thread(self, local: Client) -> None:
        given = leaves(draw(1, batch=2), ("q",))
        loss = solve_qp(local, **given).z.sum()
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        assert given["q"].grad is not None


class TestFailures:
    """Problem 1 of three is infeasible."""

    @pytest.fixture(params=["adjoint", "full"])
    def gradients(self, request: pytest.FixtureRequest) -> Any:
        return request.param

    def test_raise_names_the_problems_at_forward(self, local: Client) -> None:
        with pytest.raises(argrad.SolveError, match=r"1 of 3 problems have no solution \(1: infeasible\)") as caught:
            solve_qp(local, **infeasible())
        assert caught.value.indices == (1,)

    def test_nan_marks_rows_and_sums(self, local: Client, gradients: Any) -> None:
        given = leaves(infeasible())
        solution = solve_qp(local, **given, on_failure="nan", gradients=gradients)
        for block in (solution.z, solution.lam, solution.s):
            assert block.isnan().all(-1).tolist() == [False, True, False]
        solution.z.square().sum().backward()
        assert given["q"].grad.isnan().all(-1).tolist() == [False, True, False]  # type: ignore[union-attr]
        assert given["h"].grad.isnan().all(-1).tolist() == [False, True, False]  # type: ignore[union-attr]
        assert given["Q"].grad.isnan().all()  # type: ignore[union-attr]

    def test_zero_grad_sums_over_the_good_problems_only(self, local: Client, gradients: Any) -> None:
        given = leaves(infeasible())
        solution = solve_qp(local, **given, on_failure="zero_grad", gradients=gradients)
        assert torch.isfinite(solution.z).all()
        solution.z.square().sum().backward()
        good = leaves({k: t[[0, 2]] if k in "qh" else t for k, t in infeasible().items()})
        solve_qp(local, **good).z.square().sum().backward()
        for name in ("Q", "G"):
            assert_close(given[name].grad, good[name].grad)  # type: ignore[arg-type]
        for name in ("q", "h"):
            grad = given[name].grad
            assert grad is not None
            assert not grad[1].any()
            assert_close(grad[[0, 2]], good[name].grad)  # type: ignore[arg-type]

    @pytest.mark.parametrize("on_failure", ["nan", "zero_grad"])
    def test_a_lost_state_changes_nothing(
        self, recorder: Recorder, recorded: Client, on_failure: Any, gradients: Any
    ) -> None:
        given = leaves(infeasible())
        z = solve_qp(recorded, **given, on_failure=on_failure, gradients=gradients).z
        kept = torch.autograd.grad(z.square().sum(), list(given.values()), retain_graph=True)
        recorder.forget_states()
        lost = torch.autograd.grad(z.square().sum(), list(given.values()))
        for one, other in zip(kept, lost, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10, equal_nan=True)

    def test_all_ranks_step_when_one_has_a_failure(self, local: Client) -> None:
        """Two shards of a batch, one with the failure: the sum of their gradients is that of the good problems."""
        Q = torch.eye(2, dtype=D, requires_grad=True)
        whole = infeasible()
        for shard in (slice(0, 2), slice(2, 3)):
            part = {k: t[shard] if k in "qh" else t for k, t in whole.items()} | {"Q": Q}
            solve_qp(local, **part, on_failure="zero_grad").z.square().sum().backward()
        good = leaves({k: t[[0, 2]] if k in "qh" else t for k, t in whole.items()}, ("Q",))
        solve_qp(local, **good).z.square().sum().backward()
        assert_close(Q.grad, good["Q"].grad)  # type: ignore[arg-type]

    @pytest.mark.parametrize(("on_failure", "filler"), [("nan", float("nan")), ("zero_grad", 0.0)])
    def test_unbatched(self, local: Client, on_failure: Any, filler: float, gradients: Any) -> None:
        given = leaves({k: t[1] if k in "qh" else t for k, t in infeasible().items()})
        z = solve_qp(local, **given, on_failure=on_failure, gradients=gradients).z
        z.square().sum().backward()
        for name in given:
            wanted = torch.full_like(given[name], filler)
            torch.testing.assert_close(given[name].grad, wanted, rtol=0.0, atol=0.0, equal_nan=True)

    @pytest.mark.parametrize(("on_failure", "filler"), [("nan", float("nan")), ("zero_grad", 0.0)])
    def test_gradients_that_do_not_exist(self, local: Client, on_failure: Any, filler: float, gradients: Any) -> None:
        """z₂ is free and costs nothing in problem 0: a solution, but no gradient."""
        Q = torch.stack([torch.diag(torch.tensor([1.0, 0.0], dtype=D)), torch.eye(2, dtype=D)])
        q = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=D, requires_grad=True)
        with pytest.raises(argrad.GradientError, match=r"1 of 2 problems have no gradient \(0: nonunique\)") as caught:
            solve_qp(local, Q, q, gradients=gradients).z.sum().backward()
        assert caught.value.indices == (0,)
        solve_qp(local, Q, q, on_failure=on_failure, gradients=gradients).z.sum().backward()
        wanted = torch.tensor([[filler, filler], [-1.0, -1.0]], dtype=D)
        torch.testing.assert_close(q.grad, wanted, equal_nan=True)

    def test_forward_mode(self, local: Client) -> None:
        given = infeasible()
        for on_failure, filler in (("nan", torch.nan), ("zero_grad", 0.0)):
            with forward_ad.dual_level():
                q = forward_ad.make_dual(given["q"], torch.ones(3, 2, dtype=D))
                out = solve_qp(local, **(given | {"q": q}), on_failure=on_failure).z  # type: ignore[arg-type]
                tangent = forward_ad.unpack_dual(out).tangent
            assert_close(tangent[[0, 2], 1], torch.full((2,), -1.0, dtype=D))
            torch.testing.assert_close(tangent[1], torch.full((2,), filler, dtype=D), equal_nan=True)

    def test_cotangents_that_are_not_finite(self, local: Client, gradients: Any) -> None:
        bad = torch.ones(2, 4, dtype=D)
        bad[1, 2] = torch.inf
        for on_failure in ("raise", "nan", "zero_grad"):
            given = leaves(draw(1, batch=2, batched="q"), ("q", "Q"))
            z = solve_qp(local, **given, on_failure=on_failure, gradients=gradients).z  # type: ignore[arg-type]
            if on_failure == "raise":
                with pytest.raises(argrad.ProblemError, match=r"upstream.z: found inf at \[1, 2\]"):
                    z.backward(bad)
                continue
            z.backward(bad)
            q_grad, Q_grad = given["q"].grad, given["Q"].grad
            assert q_grad is not None
            assert Q_grad is not None
            assert torch.isfinite(q_grad[0]).all()
            assert q_grad[1].isnan().all() if on_failure == "nan" else not q_grad[1].any()
            assert Q_grad.isnan().all() if on_failure == "nan" else torch.isfinite(Q_grad).all()


class TestLayer:
    def test_returns_z_or_everything(self, local: Client) -> None:
        given = simplex()
        assert QPLayer(local)(**given).tolist() == pytest.approx([0.25, 0.75])
        z, nu, lam, s = QPLayer(local, return_duals=True)(**given)
        assert nu.tolist() == pytest.approx([-2.75])
        assert lam.tolist() == pytest.approx([0.0, 0.0], abs=1e-12)
        assert_close(s, z)

    def test_bounds_in_place_of_rows(self, local: Client) -> None:
        given = simplex()
        del given["G"], given["h"]
        zero = torch.zeros(2, dtype=D)
        assert QPLayer(local)(**given, lb=zero).tolist() == pytest.approx([0.25, 0.75])

    def test_options_travel(self, recorder: Recorder, recorded: Client) -> None:
        layer = QPLayer(recorded, tolerance=1e-9, max_iterations=50, solver="pdipm", method="kkt", timeout_s=9.0)
        layer(**leaves(simplex(), ("q",))).sum().backward()
        for _, request, _, call in recorder.exchanges:
            assert (request.solver.name, request.solver.tolerance) == ("pdipm", 1e-9)
            assert (request.solver.max_iterations, request.differentiation.method) == (50, "kkt")
            assert call.timeout_s == 9.0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"on_failure": "ignore"}, "on_failure: found 'ignore', wanted one of raise, nan, zero_grad"),
            ({"gradients": "none"}, "gradients: found 'none', wanted one of full, adjoint"),
            ({"tolerance": 1.0}, "solver.tolerance: found 1.0, wanted a number <= 0.1"),
            ({"timeout_s": -1.0}, "timeout_s: found -1.0, wanted seconds above zero"),
        ],
    )
    def test_options_are_checked_at_once(self, local: Client, options: dict[str, Any], message: str) -> None:
        with pytest.raises(argrad.ProblemError, match=re.escape(message)):
            QPLayer(local, **options)

    def test_wrong_shapes_are_found_before_anything_is_sent(self, recorder: Recorder, recorded: Client) -> None:
        with pytest.raises(argrad.ProblemError, match=r"problem.Q: found shape \(2, 2\), wanted \(3, 3\)"):
            QPLayer(recorded)(torch.eye(2, dtype=D), torch.zeros(3, dtype=D))
        with pytest.raises(argrad.ProblemError, match=r"problem.Q: found dtype torch.float16"):
            QPLayer(recorded)(torch.eye(2).half(), torch.zeros(2).half())
        with pytest.raises(argrad.ProblemError, match=r"problem.q: found ndarray, wanted a torch.Tensor"):
            QPLayer(recorded)(torch.eye(2, dtype=D), torch.zeros(2).numpy())
        with pytest.raises(argrad.ProblemError, match=r"problem.h: found nothing, wanted a tensor, as"):
            QPLayer(recorded)(torch.eye(2, dtype=D), torch.zeros(2, dtype=D), torch.ones(1, 2, dtype=D))
        assert recorder.names == []

    def test_pickles_and_copies(self) -> None:
        layer = QPLayer("local", on_failure="nan", tolerance=1e-9)
        again = pickle.loads(pickle.dumps(layer))
        assert (again.options, again.on_failure) == (layer.options, "nan")
        assert again(**simplex()).tolist() == pytest.approx([0.25, 0.75])
        assert repr(again) == "QPLayer(argrad.Client('local'), solver='auto', on_failure='nan')"
        assert copy.deepcopy(layer).client is layer.client

    def test_in_a_network(self, local: Client) -> None:
        """A layer whose linear term is learned reaches the target that the constraints allow."""
        torch.manual_seed(0)
        linear = torch.nn.Linear(3, 2, dtype=D)
        network = torch.nn.Sequential(linear)
        layer, fixed = QPLayer(local), {k: t for k, t in simplex().items() if k != "q"}
        x, target = torch.randn(5, 3, dtype=D), torch.tensor([0.4, 0.6], dtype=D)
        optimiser = torch.optim.Adam(network.parameters(), lr=0.2)
        losses = []
        for _ in range(40):
            loss = (layer(q=network(x), **fixed) - target).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < 1e-2 * losses[0]


def test_every_pair_of_blocks_and_parameters(local: Client) -> None:
    """One block's cotangent, one parameter's gradient: the same as all together."""
    parameters = leaves(draw(9, batch=2, batched="qb"))
    solution = solve_qp(local, **parameters)
    weights = [torch.randn(b.shape, dtype=D, generator=torch.Generator().manual_seed(3)) for b in solution]
    whole = torch.autograd.grad(solution, list(parameters.values()), weights, retain_graph=True)
    parts = [torch.zeros_like(t) for t in whole]
    for (i, block), (j, parameter) in itertools.product(enumerate(solution), enumerate(parameters.values())):
        parts[j] += torch.autograd.grad(block, parameter, weights[i], retain_graph=True)[0]
    for found, wanted in zip(parts, whole, strict=True):
        assert_close(found, wanted, 1e-10)
