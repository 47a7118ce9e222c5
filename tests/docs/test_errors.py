"""docs/errors.md says what the service says."""

import re

import httpx
import pytest

from argrad.problems import Flag, Status
from argrad.transport.failures import ERROR_BY_TYPE
from argrad_service.http.problems import INTERNAL, KINDS
from tests.docs.bad_requests import REQUESTS, problem, solve
from tests.docs.markdown import table

BAD_INPUT = table("docs/errors.md", "What bad input gets")


def without_estimates(text: str) -> str:
    """Gigabytes that the service estimates are its own business."""
    return re.sub(r"found \d{10,} bytes", "found … bytes", text)


def test_each_row_of_bad_input_has_its_request():
    assert list(BAD_INPUT) == list(REQUESTS)


@pytest.mark.parametrize("name", REQUESTS)
def test_bad_input_gets_what_the_table_says_and_the_next_request_works(name, service_url):
    status, kind, detail = BAD_INPUT[name]
    with httpx.Client(base_url=service_url, trust_env=False) as client:
        reply = REQUESTS[name](client)
        document = reply.json()
        assert str(reply.status_code) == status
        if reply.status_code == 200:
            assert f"`{document['status']}`" == kind
        else:
            assert reply.headers["content-type"] == "application/problem+json"
            assert f"`{document['type']}`" == kind
            if detail:
                assert without_estimates(document["detail"]) == without_estimates(detail)
            assert document["request_id"] == reply.headers["x-request-id"]
        good = solve({"problem": problem()})(client)
        assert good.json()["status"] == "optimal"


def test_every_kind_of_error_has_a_row_with_the_clients_exception():
    rows = table("docs/errors.md", "HTTP errors")
    said = {}
    for codes, (types, _, exception, _) in rows.items():
        kinds, errors = types.split(", "), exception.split(", ")
        errors = errors if len(errors) == len(kinds) else errors * len(kinds)
        for code, kind, error in zip(codes.split(", "), kinds, errors, strict=True):
            said[kind.strip("`")] = (int(code), error.strip("`"))
    for kind in {*KINDS.values(), INTERNAL}:
        assert said[kind.type][0] == kind.status
    for kind, error in ERROR_BY_TYPE.items():
        if kind != "client-closed":  # never on the wire
            assert said[kind][1] == error.__name__


@pytest.mark.parametrize(("heading", "words"), [("Statuses of a problem", Status), ("Flags of a problem", Flag)])
def test_statuses_and_flags_are_the_codes_own_words(heading, words):
    assert table("docs/errors.md", heading) == {word.value: [word.sentence] for word in words}
