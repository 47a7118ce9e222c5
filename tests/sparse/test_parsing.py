"""What the parameters of a sparse problem must agree on, and what a message says where they do not."""

import pytest
import torch

import argrad
from argrad.problems import parse
from argrad.problems.sparse_parsing import constants_of, parse_beside
from argrad.wire import JSON, decode, encode
from argrad.wire.messages import ProblemDocument, SolveRequest
from tests.sparse.problems import csr, draw, parts, tensors


def changed(name, value):
    return lambda given: given | {name: value(given[name])}


def without(*names):
    return lambda given: {name: tensor for name, tensor in given.items() if name not in names}


def with_entry(position, entry):
    def change(tensor):
        tensor = tensor.clone()
        tensor[position] = entry
        return tensor

    return change


BAD = {
    "indptr begins elsewhere": (changed("Q_indptr", with_entry(0, 1)), "problem.Q_indptr: found 1 first"),
    "indptr ends elsewhere": (changed("G_indptr", with_entry(-1, 3)), "problem.G_indptr: found 0 first and 3 last"),
    "indptr falls": (changed("G_indptr", with_entry(2, 100)), "problem.G_indptr: found 100 and then 15 at"),
    "indptr too short": (changed("A_indptr", lambda t: t[:-1]), r"problem.A_indptr: found shape \(5,\), wanted \(6,\)"),
    "column outside": (
        changed("G_indices", with_entry(4, 40)),
        r"problem.G_indices: found 40 at \[4\], wanted columns",
    ),
    "negative column": (changed("G_indices", with_entry(0, -1)), r"problem.G_indices: found -1 at \[0\]"),
    "column twice": (changed("G_indices", lambda t: t[[0, 0, *range(2, len(t))]]), "ascending columns"),
    "indices as floats": (changed("Q_indices", lambda t: t.double()), "problem.Q_indices: found dtype torch.float64"),
    "values missing": (without("G_values"), "problem.G_values: found nothing, wanted a tensor, as problem.G_indptr"),
    "matrix without vector": (without("h"), "problem.h: found nothing, wanted a tensor, as problem.G_values"),
    "vector without matrix": (
        without("A_indptr", "A_indices", "A_values"),
        "problem.A_indptr: found nothing, wanted a tensor, as problem.b is given",
    ),
    "too few values": (changed("Q_values", lambda t: t[:-1]), "problem.Q_values: found shape"),
    "NaN": (changed("Q_values", with_entry(3, float("nan"))), r"problem.Q_values: found nan at \[3\]"),
    "-inf": (changed("h", with_entry(3, float("-inf"))), "problem.h: found -inf at"),
    "other dtype": (
        changed("b", lambda t: t.float()),
        "problem.b: found dtype torch.float32, wanted dtype torch.float64",
    ),
    "a batch": (changed("q", lambda t: t.expand(2, -1)), "problem.q: .*without a batch"),
    "no q": (without("q"), "problem.q: found nothing"),
    "unknown": (lambda given: given | {"lb": given["q"]}, "problem.lb: found an unknown parameter"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_wrong_parameters_are_named(case):
    spoil, message = BAD[case]
    with pytest.raises(argrad.ProblemError, match=message):
        parse("sparse_qp", spoil(parts(draw())))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lb", torch.zeros(40, dtype=torch.float64), "bounds are rows of G"),
        ("q", torch.zeros(2, 40, dtype=torch.float64), "without a batch"),
        ("G", csr(draw(n=30)["G"]), r"problem.G: found shape \(30, 30\), wanted \(m, n\) with n = 40"),
    ],
)
def test_sparse_tensors_that_do_not_fit_are_named(name, value, message):
    client = argrad.Client("local")
    with pytest.raises(argrad.ProblemError, match=message):
        argrad.solve_qp(client, **tensors(draw()) | {name: value})


def test_a_tangent_has_the_pattern_of_its_matrix():
    client = argrad.Client("local")
    result = client.solve(argrad.QP(**tensors(draw())))
    with pytest.raises(argrad.ProblemError, match="another pattern"):
        client.jvp(result, {"G": csr(draw(seed=9)["G"])})


def test_unknown_solvers_methods_and_options_are_named():
    client, problem = argrad.Client("local"), argrad.QP(**tensors(draw()))
    for options, message in (
        (argrad.Options(solver="pivoting"), "one of auto, clarabel, breakpoint, osqp for a sparse problem"),
        (argrad.Options(solver="osqp", solver_options={"max_steps": 0}), "solver.options.max_steps"),
        (argrad.Options(solver_options={"max_steps": 9}), "options for auto"),
    ):
        with pytest.raises(argrad.ProblemError, match=message):
            client.solve(problem, options=options)
    result = client.solve(problem)
    with pytest.raises(argrad.ProblemError, match="one of auto, kkt, bpqp for a sparse problem"):
        client.vjp(result, {"z": problem.q}, options=argrad.Options(method="altdiff"))


def test_the_table_of_solvers_says_what_they_do_with_sparse_problems():
    table = {entry["name"]: entry for entry in argrad.Client("local").solvers()["solvers"]}
    assert table["osqp"]["sparse"]["problems"] == ["sparse_qp"]
    assert "max_steps" in table["osqp"]["sparse"]["own_options"]
    assert [method["name"] for method in table["clarabel"]["sparse"]["methods"]] == ["kkt", "bpqp"]
    assert table["breakpoint"]["problems"] == ["sparse_qp"], "it takes no others"
    assert set(table["pdipm"]) == set(table["breakpoint"])


@pytest.mark.parametrize("content_type", [JSON, "application/x-safetensors"])
def test_both_forms_of_the_wire_carry_patterns_as_integers(content_type):
    given = {f"problem.{name}": tensor for name, tensor in parts(draw()).items()}
    body = b"".join(encode(SolveRequest(problem=ProblemDocument(kind="sparse_qp")), given, content_type))
    message, found = decode(SolveRequest, bytearray(body), content_type)
    assert message.problem.kind == "sparse_qp"
    for name, tensor in given.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_vectors_beside_constant_matrices():
    given = parts(draw())
    vectors = {name: given[name] for name in "qhb"}
    constants = constants_of(given)
    form = parse_beside(constants, vectors)
    assert list(form.parameters) == list(parse("sparse_qp", given).parameters)
    assert all(torch.equal(tensor, given[name]) for name, tensor in form.parameters.items())
    with pytest.raises(argrad.ProblemError, match=r"problem\.h: found shape \(29,\), wanted \(30,\), a number"):
        parse_beside(constants, vectors | {"h": vectors["h"][1:]})
    with pytest.raises(argrad.ProblemError, match=r"problem\.q: found shape \(41,\), wanted \(40,\)"):
        parse_beside(constants, vectors | {"q": torch.ones(41, dtype=torch.float64)})
    with pytest.raises(argrad.ProblemError, match=r"problem\.b: found nan at \[1\]"):
        parse_beside(constants, vectors | {"b": with_entry(1, float("nan"))(vectors["b"])})
