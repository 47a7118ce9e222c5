"""Registered parameters, from the client's side: what travels, what comes back, and what happens when they are lost."""

from __future__ import annotations

import copy
import gc
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import argrad
from argrad import registered, solve_qp, solve_two_sided_qp
from argrad.aio import AsyncClient
from argrad.client import Client
from argrad.errors import DeadlineExceededError, PayloadTooLargeError, ProblemError, ProblemGoneError, StateGoneError
from argrad.nn import EnergySchedule, QPLayer, SimplexProjection, TotalVariation, differences, quadratic
from argrad.registered import Registered
from tests.client.support import D, Recorder, draw
from tests.conftest import free_port, running_service

FIXED = ("Q", "G", "h")


def given(batch: int = 3) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in draw(5, batch=batch).items() if name in ("q", *FIXED)}


def sent(recorder: Recorder) -> list[tuple[str, bool, set[str]]]:
    """Of each exchange its name, whether it names a digest, and the parameters that it sends."""
    return [
        (
            name,
            request.problem is not None and request.problem.registered is not None,
            {key.removeprefix("problem.") for key in tensors if key.startswith("problem.")},
        )
        for name, request, tensors, _ in recorder.exchanges
    ]


def gradient(client: Client, q: Tensor, fixed: Any, **options: Any) -> tuple[Tensor, ...]:
    q = q.detach().clone().requires_grad_()
    solution = solve_qp(client, q=q, **fixed, **options)
    return (*(block.detach() for block in solution), *torch.autograd.grad(solution.z.square().sum(), q))


def check_equal(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_registered_parameters_do_not_travel_and_nothing_else_changes(recorder: Recorder, recorded: Client) -> None:
    parameters = given()
    q, fixed = parameters["q"], {name: parameters[name] for name in FIXED}
    wanted = gradient(recorded, q, fixed)
    handle = recorded.register(**fixed)
    assert isinstance(handle, Registered)
    assert list(handle) == list(FIXED)
    recorder.exchanges.clear()
    check_equal(gradient(recorded, q, handle), wanted)
    check_equal(gradient(recorded, q, handle, gradients="full"), wanted)
    check_equal((QPLayer(recorded)(handle["Q"], q, handle["G"], handle["h"]),), wanted[:1])
    result = recorded.solve(argrad.QP(q=q, **handle))
    assert torch.equal(result.solution["z"], wanted[0])
    assert {(named, *names) for name, named, names in sent(recorder) if name == "solve"} == {(True, "q")}


def test_changing_the_originals_changes_nothing(recorded: Client) -> None:
    parameters = given()
    q, fixed = parameters["q"], {name: parameters[name] for name in FIXED}
    wanted = gradient(recorded, q, fixed)
    handle = recorded.register(**fixed)
    for tensor in fixed.values():
        tensor.numpy()[...] = 7.0
    check_equal(gradient(recorded, q, handle), wanted)


def test_what_is_not_the_registered_set_is_sent(recorder: Recorder, recorded: Client) -> None:
    parameters = given()
    q = parameters["q"]
    handle = recorded.register(**{name: parameters[name] for name in FIXED})
    square = recorded.register(A=torch.eye(4, dtype=D), G=2 * torch.eye(4, dtype=D))
    recorder.exchanges.clear()
    cases: dict[str, dict[str, Any]] = {
        "a part": {"Q": handle["Q"]},
        "a copy": {**handle, "h": handle["h"].clone()},
        "a view": {**handle, "h": handle["h"][:1]},
        "under another name": {"Q": handle["Q"], "A": square["G"], "b": q[0] * 0, "G": square["A"], "h": q[0] + 3},
    }
    for name, case in cases.items():
        q_ = q[:1] if name == "a view" else q
        case = {key: t[:1] if name == "a view" and key != "h" else t for key, t in case.items()}
        with torch.no_grad():
            solve_qp(recorded, q=q_, **case)
        assert [named for _, named, _ in sent(recorder)] == [False], name
        recorder.exchanges.clear()


def test_a_handle_edited_in_place_is_sent_and_never_mistaken(recorder: Recorder, recorded: Client) -> None:
    parameters = given()
    q = parameters["q"]
    handle = recorded.register(**{name: parameters[name] for name in FIXED})
    handle["h"].add_(1.0)
    recorder.exchanges.clear()
    found = solve_qp(recorded, q=q, **handle)
    wanted = solve_qp(recorded, q=q, Q=parameters["Q"], G=parameters["G"], h=parameters["h"] + 1.0)
    assert torch.equal(found.z, wanted.z)
    assert [named for _, named, _ in sent(recorder)] == [False, False]
    # What is registered in this process shares the edited memory: it must not answer for the old content.
    again = recorded.register(**{name: parameters[name] for name in FIXED})
    assert again.digest == handle.digest
    wanted = solve_qp(recorded, **parameters)
    assert torch.equal(solve_qp(recorded, q=q, **again).z, wanted.z)


def test_memory_is_forgotten_with_its_handle(recorded: Client) -> None:
    parameters = given()
    handle = recorded.register(**{name: parameters[name] for name in FIXED})
    Q = handle["Q"]
    assert recorded.registry.trusted({"Q": Q}) == {"Q"}
    del handle
    gc.collect()
    assert recorded.registry.trusted({"Q": Q}) == frozenset()


def test_what_is_lost_is_registered_again_once(recorder: Recorder, recorded: Client) -> None:
    parameters = given()
    q = parameters["q"]
    handle = recorded.register(**{name: parameters[name] for name in FIXED})
    wanted = gradient(recorded, q, handle)
    recorder.forget_states()
    recorder.exchanges.clear()
    check_equal(gradient(recorded, q, handle), wanted)
    assert [name for name, *_ in sent(recorder)] == ["solve", "register", "solve", "vjp"]


def test_a_lost_state_falls_back_on_what_is_registered(recorder: Recorder, recorded: Client) -> None:
    parameters = given()
    handle = recorded.register(**{name: parameters[name] for name in FIXED})
    wanted = gradient(recorded, parameters["q"], handle)
    q = parameters["q"].detach().clone().requires_grad_()
    solution = solve_qp(recorded, q=q, **handle)
    recorder.exchanges.clear()

    def lose(name: str, request: Any) -> None:
        if name == "vjp" and request.state is not None:
            recorder.forget_states()
            raise StateGoneError("lost", status_code=409)

    recorder.before = lose
    (grad,) = torch.autograd.grad(solution.z.square().sum(), q)
    torch.testing.assert_close(grad, wanted[-1], rtol=1e-12, atol=1e-12)
    assert [(name, named) for name, named, _ in sent(recorder)] == [
        ("vjp", False),
        ("vjp", True),
        ("register", True),
        ("vjp", True),
    ]


def test_without_room_everything_is_sent(recorder: Recorder, recorded: Client) -> None:
    parameters = given()
    handle = recorded.register(**{name: parameters[name] for name in FIXED})
    wanted = gradient(recorded, parameters["q"], handle)

    def refuse(name: str, request: Any) -> None:
        if name == "register":
            raise PayloadTooLargeError("no room", status_code=413)
        if request.problem is not None and request.problem.registered is not None:
            raise ProblemGoneError("gone", status_code=409)

    recorder.before = refuse
    recorder.exchanges.clear()
    check_equal(gradient(recorded, parameters["q"], handle), wanted)
    check_equal(gradient(recorded, parameters["q"], handle), wanted)
    assert [name for name, *_ in sent(recorder)] == ["solve", "register", "solve", "vjp", "solve", "vjp"]
    with pytest.raises(PayloadTooLargeError):
        recorded.register(**{name: parameters[name] for name in FIXED})


def test_gone_again_right_away_everything_is_sent(recorder: Recorder, recorded: Client) -> None:
    parameters = given()
    handle = recorded.register(**{name: parameters[name] for name in FIXED})

    def thrash(name: str, request: Any) -> None:
        if name == "solve" and request.problem.registered is not None:
            raise ProblemGoneError("gone", status_code=409)

    recorder.before = thrash
    recorder.exchanges.clear()
    solve_qp(recorded, q=parameters["q"], **handle)
    assert [(name, named) for name, named, _ in sent(recorder)] == [
        ("solve", True),
        ("register", True),
        ("solve", True),
        ("solve", False),
    ]


def test_one_deadline_for_all_of_it(recorder: Recorder, recorded: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = given()
    handle = recorded.register(**{name: parameters[name] for name in FIXED})
    now = [0.0]
    monkeypatch.setattr("argrad.registered.time.monotonic", lambda: now[0])

    def lose(name: str, request: Any) -> None:
        now[0] += 4.0
        if name == "solve" and request.problem.registered is not None:
            raise ProblemGoneError("gone", status_code=409)

    recorder.before = lose
    recorder.exchanges.clear()
    with pytest.raises(DeadlineExceededError):
        solve_qp(recorded, q=parameters["q"], **handle, timeout_s=10.0)
    assert [call.timeout_s for *_, call in recorder.exchanges] == [10.0, 6.0, 2.0]


def test_values_are_checked_once(recorded: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = given()
    checked: list[str] = []
    for module in ("argrad.problems.forms", "argrad.problems.content"):
        monkeypatch.setattr(f"{module}.check_finite", lambda field, *_, **__: checked.append(field))
    handle = recorded.register(**{name: parameters[name] for name in FIXED})
    assert set(checked) == {f"problem.{name}" for name in FIXED}
    checked.clear()
    solve_qp(recorded, q=parameters["q"], **handle)
    recorded.solve(argrad.QP(q=parameters["q"], **handle))
    assert set(checked) == {"problem.q"}


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({}, "problem: found no parameter"),
        ({"Q": [[1.0]]}, "problem.Q: found list"),
        ({"Q": torch.eye(2).to_sparse()}, "problem.Q: found layout torch.sparse_coo"),
        ({"R": torch.eye(2)}, "problem.R: found an unknown parameter"),
        ({"q": torch.tensor([torch.nan])}, r"problem.q: found nan at \[0\]"),
    ],
)
def test_what_cannot_be_registered(recorded: Client, recorder: Recorder, parameters: Any, words: str) -> None:
    with pytest.raises(ProblemError, match=words):
        recorded.register(**parameters)
    assert recorder.exchanges == []


def test_two_sided(recorder: Recorder, recorded: Client) -> None:
    P, A = 2 * torch.eye(2, dtype=D), torch.eye(2, dtype=D)
    u = torch.ones(2, dtype=D)
    handle = recorded.register(kind="qp_two_sided", P=P, A=A, u=u)
    q = torch.tensor([-3.0, 1.0], dtype=D)
    assert torch.equal(solve_two_sided_qp(recorded, q=q, **handle).x, solve_two_sided_qp(recorded, P, q, A, u=u).x)
    assert [named for name, named, _ in sent(recorder)] == [True, True, False]


def test_other_transforms_and_inference_mode(recorded: Client) -> None:
    parameters = given()
    q, fixed = parameters["q"], {name: parameters[name] for name in FIXED}
    with torch.inference_mode():
        handle = recorded.register(**fixed)
    jacobian = torch.func.jacrev(lambda q: solve_qp(recorded, q=q, **handle).z)(q)
    torch.testing.assert_close(jacobian, torch.func.jacrev(lambda q: solve_qp(recorded, q=q, **fixed).z)(q))
    many = torch.stack([q, q + 0.1])
    found = torch.func.vmap(lambda q: solve_qp(recorded, q=q, **handle).z)(many)
    torch.testing.assert_close(found[0], solve_qp(recorded, q=q, **fixed).z)
    check_equal(gradient(recorded, q, handle), gradient(recorded, q, fixed))


@pytest.mark.anyio
async def test_the_async_client() -> None:
    parameters = given()
    client = AsyncClient("local")
    handle = await client.register(**{name: parameters[name] for name in FIXED})
    found = await client.solve(argrad.QP(q=parameters["q"], **handle))
    wanted = await client.solve(argrad.QP(**parameters))
    assert torch.equal(found.solution["z"], wanted.solution["z"])
    await client.close()
    found = await client.solve(argrad.QP(q=parameters["q"], **handle))  # lost with the close, and registered again
    assert torch.equal(found.solution["z"], wanted.solution["z"])


class TestAutomatic:
    """`register="auto"`."""

    @pytest.fixture(autouse=True)
    def everything_is_large(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("argrad.registered.AUTOMATIC_BYTES", 1)

    def test_the_second_time_is_named(self, recorder: Recorder) -> None:
        client, parameters = Client(recorder, register="auto"), given()
        plain = Client(Recorder(), register="explicit")
        for step in range(4):
            q = parameters["q"] + step
            fixed = {name: parameters[name].clone() for name in FIXED}  # other memory, same content
            check_equal(gradient(client, q, fixed), gradient(plain, q, fixed))
        solves = [row for row in sent(recorder) if row[0] != "vjp"]
        assert solves[0] == ("solve", False, {"q", *FIXED})
        assert solves[1] == ("solve", True, {"q"})
        assert solves[2][0] == "register"
        assert solves[3:] == [("solve", True, {"q"})] * 3

    def test_edits_that_no_version_counter_sees(self, recorder: Recorder) -> None:
        client, parameters = Client(recorder, register="auto"), given()
        for step in range(6):
            parameters["h"].numpy()[...] += 0.1 * (step == 3)
            wanted = solve_qp(Client("local"), **parameters).z
            assert torch.equal(solve_qp(client, **parameters).z, wanted)

    def test_new_content_is_soon_left_alone(self, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
        client, parameters = Client(recorder, register="auto"), given()
        hashed: list[str] = []
        monkeypatch.setattr("argrad.registered.line_of", lambda name, t: hashed.append(name) or f"{name} {t.sum()}")
        for step in range(40):
            solve_qp(client, parameters["Q"].clone() + step, parameters["q"] + step)
        assert hashed.count("Q") == 6
        assert not any(named for _, named, _ in sent(recorder))

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
    @pytest.mark.parametrize("how", ["backward", "forward mode", "torch.func", "vmap", "full", "client"])
    def test_a_learned_parameter_is_never_hashed(
        self, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        hashed: set[str] = set()
        honest = registered.line_of
        monkeypatch.setattr("argrad.registered.line_of", lambda name, t: hashed.add(name) or honest(name, t))
        client, parameters = Client(recorder, register="auto"), given()
        Q, rest = parameters.pop("Q"), parameters

        def loss(Q: Tensor) -> Tensor:
            return solve_qp(client, Q, **rest).z.square().sum()

        for _ in range(4):
            if how == "forward mode":
                torch.func.jvp(loss, (Q,), (torch.ones_like(Q),))
            elif how == "torch.func":
                torch.func.grad(loss)(Q)
            elif how == "vmap":
                torch.func.vmap(torch.func.grad(loss))(torch.stack([Q, Q]))
            elif how == "client":
                result = client.solve(argrad.QP(Q=Q.clone().requires_grad_(), **rest))
                recorder.forget_states()
                client.vjp(result, {"z": torch.ones_like(rest["q"])})
            else:
                leaf = Q.clone().requires_grad_()
                z = solve_qp(client, leaf, **rest, gradients="full" if how == "full" else "adjoint").z
                recorder.forget_states()  # the backward pass sends problem and solution
                torch.autograd.grad(z.square().sum(), leaf)
        assert hashed == set(rest)
        with torch.no_grad():
            loss(Q.clone().requires_grad_())  # in evaluation nothing is learned
        assert hashed == {"Q", *rest}
        assert sent(recorder)[-1][1] or how == "vmap"  # whose constants were those of a larger batch
        assert all("Q" in names for name, _, names in sent(recorder) if name == "solve")
        assert not any("Q" in names for name, _, names in sent(recorder) if name == "register")

    def test_a_learned_sparse_matrix_is_never_hashed(self, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
        hashed: set[str] = set()
        honest = registered.line_of
        monkeypatch.setattr("argrad.registered.line_of", lambda name, t: hashed.add(name) or honest(name, t))
        client = Client(recorder, register="auto")
        Q = torch.eye(3, dtype=D).to_sparse()
        for _ in range(4):
            leaf = Q.detach().clone().requires_grad_()
            z = solve_qp(client, leaf, torch.ones(3, dtype=D)).z
            recorder.forget_states()
            torch.autograd.grad(z.square().sum(), leaf)
        assert "Q_values" not in hashed
        assert "q" in hashed

    def test_explicit_and_local_hash_nothing(self, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("argrad.registered.line_of", lambda *_: pytest.fail("hashed"))
        for client in (Client(recorder, register="explicit"), Client("local", register="auto")):
            for _ in range(2):
                solve_qp(client, **given())

    def test_no_other_way(self) -> None:
        with pytest.raises(ProblemError, match="register: found 'always', wanted one of auto, explicit"):
            Client("local", register="always")  # type: ignore[arg-type]


class TestLayers:
    """Constants that a layer alone has."""

    def solves(self, recorder: Recorder) -> list[tuple[bool, set[str]]]:
        return [(named, names) for name, named, names in sent(recorder) if name == "solve"]

    def test_constants_are_named(self, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(quadratic, "REGISTERED_BYTES", 1)
        y = torch.randn(3, 6, dtype=D, generator=torch.Generator().manual_seed(0))
        inputs: dict[Any, tuple[Any, ...]] = {
            EnergySchedule: (0.5,),
            SimplexProjection: (),
            TotalVariation: (differences(6, dtype=D), 0.3),
        }
        rest = {EnergySchedule: {"q", "h"}, SimplexProjection: {"q", "b"}, TotalVariation: {"q", "G"}}
        for layer_type, more in inputs.items():
            recorder.exchanges.clear()
            layer = layer_type(Client(recorder, register="explicit"))
            values = []
            for limit in (1, 1 << 40):
                monkeypatch.setattr(quadratic, "REGISTERED_BYTES", limit)
                layer_ = layer if limit == 1 else layer_type(Client("local"))
                leaf = y.clone().requires_grad_()
                for _ in range(2):
                    x = layer_(leaf, *more)
                values.append((x.detach(), *torch.autograd.grad(x.square().sum(), leaf)))
            check_equal(*values)
            assert self.solves(recorder) == [(True, rest[layer_type])] * 3  # the first is lost, sent and repeated
            layer(y[:, :5], *((differences(5, dtype=D), 0.3) if layer_type is TotalVariation else more))
            copied = pickle.loads(pickle.dumps(layer_type("local")))
            torch.testing.assert_close(copied(y, *more), values[0][0])
            assert "_kept" not in copy.deepcopy(layer).__dict__

    def test_small_ones_are_sent(self, recorder: Recorder) -> None:
        EnergySchedule(Client(recorder))(torch.ones(3, dtype=D), 0.5)
        assert self.solves(recorder) == [(False, {"Q", "q", "G", "h"})]


def test_a_handle_pickles_with_its_client(service_url: str) -> None:
    parameters = given()
    client = Client(service_url)
    handle = client.register(**{name: parameters[name] for name in FIXED})
    wanted = solve_qp(client, **parameters).z
    there, again = pickle.loads(pickle.dumps((client, handle)))
    assert there.registry.trusted(dict(again)) == set(FIXED)
    assert torch.equal(solve_qp(there, q=parameters["q"], **again).z, wanted)
    assert copy.deepcopy(handle) is handle


def test_a_handle_survives_a_fork(service_url: str) -> None:
    parameters = given()
    client = Client(service_url)
    handle = client.register(**{name: parameters[name] for name in FIXED})
    wanted = solve_qp(client, q=parameters["q"], **handle).z
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        same = torch.equal(solve_qp(client, q=parameters["q"], **handle).z, wanted)
        named = len(client.registry.trusted(dict(handle))) == len(FIXED)
        os._exit(0 if same and named else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.slow
def test_a_restart_between_two_calls_and_a_deletion(tmp_path: Path) -> None:
    import httpx

    parameters = given()
    port = free_port()
    client = Client(f"http://127.0.0.1:{port}")
    with running_service(tmp_path / "one.txt", port=port):
        handle = client.register(**{name: parameters[name] for name in FIXED})
        wanted = gradient(client, parameters["q"], handle)
        q = parameters["q"].clone().requires_grad_()
        solution = solve_qp(client, q=q, **handle)
    with running_service(tmp_path / "two.txt", port=port) as (url, _):
        (grad,) = torch.autograd.grad(solution.z.square().sum(), q)
        torch.testing.assert_close(grad, wanted[-1], rtol=1e-12, atol=1e-12)
        check_equal(gradient(client, parameters["q"], handle), wanted)
        with httpx.Client(base_url=url, trust_env=False) as plain:
            assert plain.get(f"/v1/problems/{handle.digest}").status_code == 200
            assert plain.delete(f"/v1/problems/{handle.digest}").status_code == 204
            check_equal(gradient(client, parameters["q"], handle), wanted)
            assert plain.get(f"/v1/problems/{handle.digest}").status_code == 200
    client.close()
