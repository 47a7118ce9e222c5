"""`Client` and `AsyncClient`: results, checks before anything is sent, lost states, forks."""

from __future__ import annotations

import copy
import importlib.metadata
import os
import pickle
import re
from typing import Any

import httpx
import pytest
import torch

import argrad
from argrad import Options
from argrad.client import Client
from argrad.problems import parse
from tests.client.support import D, FakeService, Recorder, assert_close, infeasible, simplex

QP = argrad.QP(**simplex())
G1 = {"z": torch.tensor([1.0, 0.0], dtype=D)}


class TestResults:
    def test_solve(self, local: Client) -> None:
        result = local.solve(QP)
        assert result.solution["z"].tolist() == pytest.approx([0.25, 0.75])
        assert result.solution["nu"].tolist() == pytest.approx([-2.75])
        assert result.statuses == (argrad.Status.OPTIMAL,)
        assert result.failed == ()
        assert (result.gradients, result.adjoint, result.gradient_statuses) == (None, None, ())
        assert (result.report.solver, result.report.method, result.report.flags) == ("pivoting", None, ((),))
        assert float(result.report.objective) == pytest.approx(1.875)
        assert result.state is not None

    def test_solve_with_gradients(self, local: Client) -> None:
        result = local.solve(QP, upstream=G1, wrt=["q", "b"])
        assert result.gradients is not None
        assert {k: v.tolist() for k, v in result.gradients.items()} == {
            "q": pytest.approx([-0.25, 0.25]),
            "b": pytest.approx([0.25]),
        }
        assert (result.gradient_statuses, result.state, result.report.method) == (("ok",), None, "kkt")

    def test_solve_with_an_adjoint(self, local: Client) -> None:
        result = local.solve(QP, upstream=G1, gradients="adjoint")
        assert result.gradients is None
        assert result.adjoint is not None
        assert result.adjoint["z"].tolist() == pytest.approx([-0.25, 0.25])
        assert set(result.adjoint) == {"z", "nu", "mu"}

    def test_the_report_has_the_options_of_the_method(self, local: Client) -> None:
        options = Options(
            solver="pdipm", method="smoothed", method_options={"smoothing": "random", "seed": 3, "samples": 5}
        )
        result = local.solve(QP, options=options, upstream=G1)
        wanted = {"smoothing": "random", "seed": 3, "samples": 5, "sigma": 0.1}
        assert result.report.method_options == wanted
        assert local.vjp(local.solve(QP, options=options), G1, options=options).report.method_options == wanted
        assert local.solve(QP, upstream=G1).report.method_options == {}

    @pytest.mark.parametrize("by", ["state", "point"])
    def test_vjp(self, local: Client, by: str) -> None:
        at: argrad.Point = local.solve(QP)
        if by == "point":
            at = argrad.Point(problem=at.problem, solution=at.solution)
        upstream = {"z": torch.eye(2, dtype=D)}
        result = local.vjp(at, upstream, wrt=["q"])
        assert result.gradients is not None
        assert_close(result.gradients["q"], torch.tensor([[-0.25, 0.25], [0.25, -0.25]], dtype=D))

    @pytest.mark.parametrize("by", ["state", "point"])
    def test_jvp(self, local: Client, by: str) -> None:
        at: argrad.Point = local.solve(QP)
        if by == "point":
            at = argrad.Point(problem=at.problem, solution=at.solution)
        result = local.jvp(at, {"b": torch.ones(1, dtype=D)})
        assert result.tangents["z"].tolist() == pytest.approx([0.25, 0.75])
        assert result.gradient_statuses == ("ok",)

    def test_warm_start(self, local: Client) -> None:
        cold = local.solve(QP)
        warm = local.solve(QP, warm_start=cold.solution)
        assert_close(warm.solution["z"], cold.solution["z"])

    def test_bounds_and_two_sided_rows(self, local: Client) -> None:
        q = torch.tensor([-3.0, 0.5], dtype=D)
        eye = torch.eye(2, dtype=D)
        bounded = parse("qp", {"Q": eye, "q": q, "lb": torch.zeros(2, dtype=D), "ub": torch.ones(2, dtype=D)})
        result = local.solve(bounded)
        assert result.solution["z"].tolist() == pytest.approx([1.0, 0.0])
        assert result.solution["lam_ub"].tolist() == pytest.approx([2.0, 0.0])
        assert result.solution["lam_lb"].tolist() == pytest.approx([0.0, 0.5])
        sides = {"l": torch.zeros(2, dtype=D), "u": torch.ones(2, dtype=D)}
        result = local.solve(parse("qp_two_sided", {"P": eye, "q": q, "A": eye, **sides}))
        assert result.solution["x"].tolist() == pytest.approx([1.0, 0.0])
        assert result.solution["y"].tolist() == pytest.approx([2.0, -0.5])

    def test_float32_in_float32_out(self, local: Client) -> None:
        problem = argrad.QP(**{name: t.float() for name, t in simplex().items()})
        result = local.solve(problem, upstream={"z": torch.tensor([1.0, 0.0])})
        assert result.gradients is not None
        assert {t.dtype for t in (*result.solution.values(), *result.gradients.values())} == {torch.float32}

    def test_failed_problems(self, local: Client) -> None:
        problem = argrad.QP(**infeasible())
        with pytest.raises(argrad.SolveError, match=r"1 of 3 problems have no solution \(1: infeasible\)") as caught:
            local.solve(problem)
        assert caught.value.indices == (1,)
        result = local.solve(problem, check=False, upstream={"z": torch.ones(3, 2, dtype=D)}, wrt=["q"])
        assert result.failed == (1,)
        assert result.statuses[::2] == (argrad.Status.OPTIMAL,) * 2
        assert result.gradients is not None
        assert result.gradients["q"].isnan().any(-1).tolist() == [False, True, False]

    def test_refused_gradients(self, local: Client) -> None:
        flat = argrad.QP(Q=torch.zeros(2, 2, dtype=D), q=torch.zeros(2, dtype=D))
        result = local.solve(flat)
        assert result.report.flags == ((argrad.Flag.NONUNIQUE,),)
        with pytest.raises(argrad.GradientError, match="1 of 1 problems have no gradient") as caught:
            local.vjp(result, G1)
        assert caught.value.indices == (0,)
        zeros = local.vjp(result, G1, check=False, failed_gradients="zero", wrt=["q"]).gradients
        assert zeros is not None
        assert zeros["q"].tolist() == [0.0, 0.0]


class TestChecksBeforeSending:
    """The same words as the service's, and nothing sent."""

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            pytest.param(
                lambda c, r: c.solve(argrad.QP(**simplex() | {"q": torch.tensor([1.0, torch.nan], dtype=D)})),
                "problem.q: found nan at [1], wanted finite numbers",
                id="nan",
            ),
            pytest.param(
                lambda c, r: c.solve(QP, upstream={"z": torch.zeros(3, dtype=D)}),
                "upstream.z: found shape (3,), wanted (2,) or (k, 2)",
                id="upstream-shape",
            ),
            pytest.param(
                lambda c, r: c.solve(QP, upstream={"x": torch.zeros(2, dtype=D)}),
                "upstream: found 'x', wanted one of z, nu, lam, s",
                id="upstream-name",
            ),
            pytest.param(
                lambda c, r: c.vjp(r, {"z": torch.tensor([torch.inf, 0.0], dtype=D)}),
                "upstream.z: found inf at [0], wanted finite numbers",
                id="upstream-infinite",
            ),
            pytest.param(
                lambda c, r: c.vjp(r, G1, wrt=["lb"]), "wrt: found 'lb', wanted one of Q, q, G, h, A, b", id="wrt"
            ),
            pytest.param(
                lambda c, r: c.jvp(r, {"q": torch.zeros(3, dtype=D)}),
                "tangents.q: found shape (3,), wanted (2,), as problem.q has",
                id="tangent-shape",
            ),
            pytest.param(
                lambda c, r: c.solve(QP, warm_start={"z": torch.zeros(2, dtype=D)}),
                "warm_start.nu: found nothing, wanted a tensor of shape (1,)",
                id="warm-start",
            ),
            pytest.param(lambda c, r: c.solve(QP, timeout_s=0.0), "timeout_s: found 0.0, wanted seconds", id="timeout"),
            pytest.param(
                lambda c, r: c.solve(QP, timeout_s=float("inf")), "timeout_s: found inf, wanted seconds", id="for-ever"
            ),
            pytest.param(lambda c, r: c.solve({"q": 1}), "problem: found dict, wanted argrad.QP(…)", id="no-problem"),
            pytest.param(lambda c, r: c.vjp(None, G1), "at: found NoneType, wanted the result of", id="no-point"),
            pytest.param(lambda c, r: c.jvp({}, G1), "at: found dict, wanted the result of a solve", id="jvp-no-point"),
            pytest.param(lambda c, r: c.vjp(r, G1, wrt="Q"), "wrt: found 'Q', wanted names in", id="wrt-text"),
            pytest.param(
                lambda c, r: c.solve(QP, upstream=torch.ones(2)),
                "upstream: found Tensor, wanted tensors by name, such as {'z': tensor}",
                id="upstream-without-names",
            ),
            pytest.param(
                lambda c, r: c.vjp(r, {"z": [1.0, 0.0]}),
                "upstream.z: found list, wanted a torch.Tensor",
                id="upstream-of-lists",
            ),
            pytest.param(
                lambda c, r: c.solve(QP, options={"tolerance": 1e-6}),
                "options: found dict, wanted argrad.Options(…)",
                id="options-as-dict",
            ),
            pytest.param(
                lambda c, r: c.solve(QP, warm_start=5),
                "warm_start: found int, wanted tensors by name",
                id="warm-start-5",
            ),
        ],
    )
    def test_refused(self, recorder: Recorder, recorded: Client, call: Any, message: str) -> None:
        result = recorded.solve(QP)
        with pytest.raises(argrad.ProblemError, match=re.escape(message)):
            call(recorded, result)
        assert recorder.names == ["solve"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"tolerance": 0.0}, "solver.tolerance: found 0.0, wanted a number >= 1e-12"),
            ({"max_iterations": 10**9}, "solver.max_iterations: found 1000000000, wanted a number <= 10000"),
            ({"method": 3}, "differentiation.method: found 3, wanted a valid string"),
        ],
    )
    def test_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(argrad.ProblemError, match=re.escape(message)):
            Options(**options)

    def test_what_only_the_service_knows_comes_from_there(self, local: Client) -> None:
        with pytest.raises(argrad.ProblemError, match=r"solver.name: found 'nobody'"):
            local.solve(QP, options=Options(solver="nobody"))


class TestArguments:
    @pytest.mark.parametrize("make", [Client, argrad.AsyncClient, argrad.nn.QPLayer])
    @pytest.mark.parametrize(
        ("target", "message"),
        [
            (None, "url: found NoneType, wanted an address, a sequence of addresses, 'local', or a backend"),
            (8000, "url: found int, wanted an address"),
            (argrad.AsyncClient("http://host"), "url: found AsyncClient, wanted an address"),
            (
                "http://host:99999",
                "url: found 'http://host:99999' (Port out of range 0-65535), wanted http://host:port",
            ),
            ("http://host:0", "url: found 'http://host:0' with port 0, wanted http://host:port"),
        ],
        ids=["none", "number", "client", "port", "port-0"],
    )
    def test_what_is_no_target_is_refused(self, make: Any, target: Any, message: str) -> None:
        with pytest.raises(argrad.ProblemError, match=re.escape(message)):
            make(target)

    @pytest.mark.parametrize("make", [Client, argrad.AsyncClient])
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"timeout_s": "3"}, "timeout_s: found '3', wanted seconds above zero, at most 1e8, or None for no limit"),
            ({"timeout_s": float("nan")}, "timeout_s: found nan, wanted seconds"),
            ({"timeout_s": 1e9}, "timeout_s: found 1000000000.0, wanted seconds"),
            ({"timeout_s": True}, "timeout_s: found True, wanted seconds"),
            ({"retries": 1.5}, "retries: found 1.5, wanted 0 or more"),
            ({"retries": True}, "retries: found True, wanted 0 or more"),
        ],
        ids=["text", "nan", "centuries", "truth", "half-a-retry", "truth-retries"],
    )
    def test_what_is_no_number_is_refused(self, make: Any, given: dict[str, Any], message: str) -> None:
        with pytest.raises(argrad.ProblemError, match=re.escape(message)):
            make("http://host", **given)

    @pytest.mark.parametrize("solve", [argrad.solve_qp, argrad.solve_lp], ids=["qp", "lp"])
    def test_functions_want_a_client(self, solve: Any) -> None:
        with pytest.raises(argrad.ProblemError, match=r"client: found str, wanted argrad.Client\(…\)"):
            solve("http://host", torch.eye(2, dtype=D), torch.ones(2, dtype=D))

    def test_layers_take_several_addresses(self) -> None:
        layer = argrad.nn.QPLayer(["http://one", "http://two"])
        assert repr(layer.client) == "argrad.Client(('http://one', 'http://two'))"


class TestLostStates:
    def test_vjp_and_jvp_send_problem_and_solution_once(self, recorder: Recorder, recorded: Client) -> None:
        result = recorded.solve(QP)
        before = recorded.vjp(result, G1)
        recorder.forget_states()
        after = recorded.vjp(result, G1)
        assert before.gradients is not None
        assert after.gradients is not None
        for name, gradient in before.gradients.items():
            assert_close(after.gradients[name], gradient)
        tangents = recorded.jvp(result, {"b": torch.ones(1, dtype=D)}).tangents
        assert tangents["z"].tolist() == pytest.approx([0.25, 0.75])
        assert recorder.names == ["solve", "vjp", "vjp", "vjp", "jvp", "jvp"]
        _, by_state, by_state_again, stateless, *_ = [
            (request, tensors) for _, request, tensors, _ in recorder.exchanges
        ]
        assert by_state[0].state == by_state_again[0].state == result.state
        assert list(by_state[1]) == ["upstream.z"]
        assert (stateless[0].state, stateless[0].problem.kind) == (None, "qp")
        assert set(stateless[1]) == {f"problem.{k}" for k in QP.parameters()} | {
            "solution.z",
            "solution.nu",
            "solution.lam",
            "upstream.z",
        }

    def test_over_http(self) -> None:
        service = FakeService()
        client = Client("http://127.0.0.1:9", transport=service.transport)
        result = client.solve(QP)
        service.backend.close()
        gradients = client.vjp(result, G1, wrt=["q"]).gradients
        assert gradients is not None
        assert gradients["q"].tolist() == pytest.approx([-0.25, 0.25])
        assert [received.path for received in service.received] == ["/v1/solve", "/v1/vjp", "/v1/vjp"]
        assert len({received.headers["argrad-affinity"] for received in service.received}) == 1

    @pytest.mark.parametrize(("solver", "method"), [("barrier", "unrolled"), ("admm", "altdiff")])
    @pytest.mark.parametrize("lost", ["gone", "never kept"])
    def test_a_method_that_repeats_iterations_solves_again(
        self, recorder: Recorder, recorded: Client, solver: str, method: str, lost: str
    ) -> None:
        options = Options(solver=solver, method=method)
        kept = recorded.solve(QP, options=options)
        wanted = recorded.vjp(kept, G1, options=options, wrt=["q", "b"]).gradients
        result = recorded.solve(QP, options=options, keep_state=lost == "gone")

        def fail(name: str, _: Any) -> None:
            if name == "vjp":
                raise argrad.StateGoneError("gone", status_code=409, type="state-gone")

        recorder.before = fail
        before = len(recorder.names)
        found = recorded.vjp(result, G1, options=options, wrt=["q", "b"]).gradients
        assert recorder.names[before:] == (["vjp", "solve"] if lost == "gone" else ["solve"])
        assert wanted is not None
        assert found is not None
        assert {name: tensor.tolist() for name, tensor in found.items()} == {
            name: tensor.tolist() for name, tensor in wanted.items()
        }

    def test_a_state_that_is_gone_twice_is_an_error(self, recorder: Recorder, recorded: Client) -> None:
        result = recorded.solve(QP)

        def fail(name: str, _: Any) -> None:
            if name == "vjp":
                raise argrad.StateGoneError("gone", status_code=409, type="state-gone")

        recorder.before = fail
        with pytest.raises(argrad.StateGoneError, match="gone"):
            recorded.vjp(result, G1)
        assert recorder.names == ["solve", "vjp", "vjp"]


class TestProcesses:
    @pytest.mark.parametrize("target", ["local", "http://127.0.0.1:9"])
    def test_pickles_and_copies(self, target: str) -> None:
        client = Client(target, timeout_s=5.0)
        again = pickle.loads(pickle.dumps(client))
        assert repr(again) == f"argrad.Client({target!r})"
        assert again.timeout_s == 5.0
        assert copy.copy(client) is copy.deepcopy(client) is client

    def test_the_engine_does_not_survive_a_fork(self, local: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        parent = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: parent + 1)
        for call in (lambda: local.solve(QP), local.solvers):
            with pytest.raises(argrad.ForkedError, match="'spawn' start method"):
                call()

    def test_a_forked_copy_lets_go_of_nothing(self, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
        client = Client(recorder)
        client.let_go("the parent's")
        parent = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: parent + 1)
        client.solve(QP)
        assert recorder.released == []

    def test_without_the_engine_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        message = re.escape(
            "argrad.Client('local') needs packages that are not installed: pip install 'argrad[service]'"
        )
        monkeypatch.setattr("argrad.arguments.entry_points", lambda **_: ())
        with pytest.raises(argrad.MissingExtraError, match=message):
            Client("local")
        broken = importlib.metadata.EntryPoint("local", "no_such_package:create", "argrad.backends")
        monkeypatch.setattr("argrad.arguments.entry_points", lambda **_: (broken,))
        with pytest.raises(argrad.MissingExtraError, match=message) as caught:
            Client("local")
        assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_observer() -> None:
    seen: list[argrad.Observation] = []
    client = Client("http://127.0.0.1:9", transport=FakeService().transport, observer=seen.append)
    client.vjp(client.solve(QP), G1)
    assert [observation.name for observation in seen] == ["solve", "vjp"]
    for observation in seen:
        assert 1e3 * observation.elapsed_s > sum(observation.timings_ms.values()) > 0


def test_solvers(local: Client) -> None:
    row = local.solvers()["solvers"][0]
    assert (row["name"], [method["name"] for method in row["methods"]][:2]) == ("pivoting", ["kkt", "bpqp"])


class TestAsync:
    pytestmark = pytest.mark.anyio

    async def test_local(self) -> None:
        async with argrad.AsyncClient("local") as client:
            result = await client.solve(QP)
            vjp = await client.vjp(result, G1, wrt=["q"])
            jvp = await client.jvp(result, {"b": torch.ones(1, dtype=D)})
            table = await client.solvers()
        assert vjp.gradients is not None
        assert vjp.gradients["q"].tolist() == pytest.approx([-0.25, 0.25])
        assert jvp.tangents["z"].tolist() == pytest.approx([0.25, 0.75])
        assert table["solvers"][0]["name"] == "pivoting"

    async def test_http_with_faults(self) -> None:
        service = FakeService(httpx.ConnectError("refused"))
        async with argrad.AsyncClient("http://127.0.0.1:9", api_key="key", transport=service.transport) as client:
            result = await client.solve(QP)
            client.release(result)
            service.backend.close()
            vjp = await client.vjp(result, G1, wrt=["q"])
            table = await client.solvers()
        assert vjp.gradients is not None
        assert vjp.gradients["q"].tolist() == pytest.approx([-0.25, 0.25])
        assert table["solvers"][0]["name"] == "pivoting"
        paths = [received.path for received in service.received]
        assert paths == ["/v1/solve", "/v1/solve", "/v1/vjp", "/v1/vjp", "/v1/solvers"]
        assert service.received[2].headers["argrad-release"] == result.state
        assert {received.headers["authorization"] for received in service.received} == {"Bearer key"}

    async def test_a_real_service(self, service_url: str) -> None:
        async with argrad.AsyncClient(service_url) as client:
            result = await client.solve(QP, upstream=G1, wrt=["b"])
            with pytest.raises(argrad.ProblemError, match=r"solver.name: found 'nobody'"):
                await client.solve(QP, options=Options(solver="nobody"))
        assert result.gradients is not None
        assert result.gradients["b"].tolist() == pytest.approx([0.25])

    async def test_failures_raise(self) -> None:
        async with argrad.AsyncClient("local") as client:
            with pytest.raises(argrad.SolveError, match="1: infeasible"):
                await client.solve(argrad.QP(**infeasible()))
            assert (await client.solve(argrad.QP(**infeasible()), check=False)).failed == (1,)
