"""What /docs and /openapi.json say: schemas from the wire documents, with their tensors, and replayed examples."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from argrad.wire import JSON, SAFETENSORS
from argrad.wire.messages import (
    JvpReply,
    JvpRequest,
    Message,
    RegisteredReply,
    RegisterRequest,
    SolveReply,
    SolveRequest,
    VjpReply,
    VjpRequest,
)
from argrad_service.http import examples
from argrad_service.http.guard import OPEN
from argrad_service.http.problems import CONTENT_TYPE, INTERNAL, KINDS, Kind

_REF = "#/components/schemas/{model}"
_DOCUMENTS: tuple[type[Message], ...] = (
    SolveRequest,
    VjpRequest,
    JvpRequest,
    RegisterRequest,
    SolveReply,
    VjpReply,
    JvpReply,
    RegisteredReply,
)
_TENSOR_NAMES = {
    "problem": ("Q", "q", "G", "h", "A", "b", "lb", "ub", "entropy", "P", "l", "u"),
    "report": ("iterations", "primal_residual", "dual_residual", "gap", "objective"),
}
_SECTIONS_WITH_DOCUMENT = {"problem": "ProblemDocument", "report": "ReportDocument"}

_TENSOR = {
    "description": 'Nested lists of numbers; "Infinity", "-Infinity" and "NaN" stand for what is not finite. A number '
    "a problem in a report of a single problem, and for an entropy that all problems share.",
    "anyOf": [
        {"type": "number"},
        {"enum": ["Infinity", "-Infinity", "NaN"]},
        {"type": "array", "items": {"$ref": _REF.format(model="Tensor")}},
    ],
}
_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_PROBLEM = {
    "description": "An error (RFC 9457).",
    "type": "object",
    "required": ["type", "title", "status", "detail", "request_id"],
    "properties": {
        "type": {"enum": sorted({kind.type for kind in (*KINDS.values(), INTERNAL)})},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "request_id": {"type": "string"},
        "field": {"type": "string", "description": "What is wrong."},
        "found": {"type": "string", "description": "What was there."},
        "wanted": {"type": "string", "description": "What would have been accepted."},
        "what": {"type": "string", "description": "Of `not-installed`: what needs packages that are not there."},
        "extra": {"type": "string", "description": "Of `not-installed`: the extra of argrad that installs them."},
    },
}
_HEADERS = [
    {
        "name": "Content-Encoding",
        "in": "header",
        "schema": {"enum": ["identity", "zstd"]},
        "description": "`zstd`: the body is one frame of zstd. The limits are those of any body, before and after.",
    },
    {
        "name": "Argrad-Timeout-Ms",
        "in": "header",
        "schema": {"type": "number", "exclusiveMinimum": 0},
        "description": "Deadline of this call, in milliseconds from its arrival.",
    },
    {
        "name": "Argrad-Release",
        "in": "header",
        "schema": {"type": "string"},
        "description": "State tokens, separated by commas, that may be freed.",
    },
    {
        "name": "X-Request-ID",
        "in": "header",
        "schema": {"type": "string", "maxLength": 128},
        "description": "Comes back in the reply and stands in the log.",
    },
]

_CALL_HEADERS = [
    *_HEADERS,
    {
        "name": "Idempotency-Key",
        "in": "header",
        "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
        "description": "A name for this call, new for each. The same call again gets the first one's reply, if that "
        "was good and of at most 256 KiB, without being solved again; while the first is being served it gets 409, "
        "and another call under the same name 422. Names are each API key's own.",
    },
]
_REPLAYED = {
    "Idempotent-Replayed": {
        "schema": {"const": "true"},
        "description": "There if this is the reply to an earlier call with the same `Idempotency-Key`.",
    },
}


_KEY = {
    "type": "http",
    "scheme": "bearer",
    "description": "An API key, where the service has any; without keys it listens on loopback alone.",
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    kinds: dict[int, dict[Kind, None]] = {}
    for kind in (*KINDS.values(), INTERNAL):
        kinds.setdefault(kind.status, {})[kind] = None
    content = {CONTENT_TYPE: {"schema": {"$ref": _REF.format(model="Problem")}}}
    described = {status: " ".join(f"`{kind.type}`: {kind.title}" for kind in kinds[status]) for status in statuses}
    return {status: {"description": words, "content": content} for status, words in described.items()}


def _call(request: type[Message], reply: type[Message], given: dict[str, examples.Example]) -> dict[str, Any]:
    """Arguments of a route that takes and returns a message."""

    def content(model: type[Message], side: str) -> dict[str, Any]:
        shown = {name: {"summary": e.summary, "value": getattr(e, side)} for name, e in given.items()}
        return {JSON: {"schema": {"$ref": _REF.format(model=model.__name__)}, "examples": shown}, SAFETENSORS: _BINARY}

    statuses = {400, 406, 408, 409, 413, 415, 422, 429, 500, 501, 503, 504}
    return {
        "openapi_extra": {
            "requestBody": {"required": True, "content": content(request, "request")},
            "parameters": _CALL_HEADERS,
        },
        "responses": {
            200: {
                "description": "The result; a verdict on each problem.",
                "content": content(reply, "reply"),
                "headers": _REPLAYED,
            },
            **_errors(*sorted(statuses)),
        },
    }


def _link(operation: str, description: str, **where: Any) -> dict[str, Any]:
    """What may follow a reply: an operation, and which of its parameters or of its body the reply gives."""
    return {"operationId": operation, "description": description, **where}


def _plain(description: str, media_type: str, example: object = None, *errors: int) -> dict[str, Any]:
    shown = {} if example is None else {"example": example}
    return {"responses": {200: {"description": description, "content": {media_type: shown}}, **_errors(*errors)}}


_STATE = "$response.body#/state"
SOLVE = _call(SolveRequest, SolveReply, examples.SOLVE)
SOLVE["responses"][200]["links"] = {
    "vjp": _link("vjp", "Pull cotangents back at the state that is kept.", requestBody={"state": _STATE}),
    "jvp": _link("jvp", "Push tangents forward at the state that is kept.", requestBody={"state": _STATE}),
    "free": _link("delete_state", "Free the state early.", parameters={"token": _STATE}),
}
VJP = _call(VjpRequest, VjpReply, examples.VJP)
JVP = _call(JvpRequest, JvpReply, examples.JVP)
DELETE_STATE: dict[str, Any] = {
    "status_code": 204,
    "openapi_extra": {
        "parameters": [{"name": "token", "in": "path", "required": True, "schema": {"type": "string"}}],
    },
    "responses": {204: {"description": "The state is gone."}, **_errors(409)},
}
_DIGEST_IN_PATH = {
    "name": "sha256",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
    "description": "Digest of the kind and of each parameter's name, dtype, shape and elements, as docs/api.md defines "
    "it.",
}


_NAME = "$response.body#/registered"
_REGISTERED_LINKS = {
    "solve": _link(
        "solve", "Solve with what is registered.", requestBody={"problem": {"kind": "qp", "registered": _NAME}}
    ),
    "look": _link("get_problem", "Ask what is registered.", parameters={"sha256": _NAME}),
    "forget": _link("delete_problem", "Forget it.", parameters={"sha256": _NAME}),
}


def _registered(description: str) -> dict[str, Any]:
    reference = {"$ref": _REF.format(model="RegisteredReply")}
    content = {JSON: {"schema": reference, "example": examples.REGISTER.reply}, SAFETENSORS: _BINARY}
    return {"description": description, "content": content, "links": _REGISTERED_LINKS}


PUT_PROBLEM: dict[str, Any] = {
    "openapi_extra": {
        "parameters": [_DIGEST_IN_PATH, *_HEADERS],
        "requestBody": {
            "required": True,
            "content": {
                JSON: {
                    "schema": {"$ref": _REF.format(model="RegisterRequest")},
                    "example": examples.REGISTER.request,
                },
                SAFETENSORS: _BINARY,
            },
        },
    },
    "responses": {
        200: _registered("They were registered already."),
        201: _registered("They are registered now."),
        **_errors(400, 406, 408, 413, 415, 422, 429, 500, 501, 504),
    },
}
GET_PROBLEM: dict[str, Any] = {
    "openapi_extra": {"parameters": [_DIGEST_IN_PATH]},
    "responses": {200: _registered("What is registered."), **_errors(406, 409, 422)},
}
DELETE_PROBLEM: dict[str, Any] = {
    "status_code": 204,
    "openapi_extra": {"parameters": [_DIGEST_IN_PATH]},
    "responses": {204: {"description": "It is forgotten."}, **_errors(409, 422)},
}
SOLVERS = _plain("The table.", JSON)
LIVE = _plain("The process answers.", JSON, {"status": "live"})
READY = _plain("Send work.", JSON, None, 503)
METRICS = _plain("Metrics.", "text/plain")


def document(app: FastAPI) -> dict[str, Any]:
    """/openapi.json: FastAPI's own, with the wire documents and their tensors among the schemas."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schemas = schema.setdefault("components", {}).setdefault("schemas", {})
        schemas |= _schemas()
        schema["components"]["securitySchemes"] = {"key": _KEY}
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                _guard(operation, is_open=path in OPEN)
        app.openapi_schema = schema
    return app.openapi_schema


def _guard(operation: dict[str, Any], *, is_open: bool) -> None:
    """Add what may become of a request before its route is looked for."""
    if not is_open:
        operation["security"] = [{"key": []}, {}]
    guarded = _errors(400, 403) if is_open else _errors(400, 401, 403, 429)
    own = operation["responses"]
    operation["responses"] = dict(sorted((own | {str(s): r for s, r in guarded.items() if str(s) not in own}).items()))


def _schemas() -> dict[str, Any]:
    _, generated = models_json_schema([(model, "validation") for model in _DOCUMENTS], ref_template=_REF)
    schemas: dict[str, Any] = generated["$defs"]
    tensor = {"$ref": _REF.format(model="Tensor")}
    for section, name in _SECTIONS_WITH_DOCUMENT.items():
        schemas[name]["properties"] |= dict.fromkeys(_TENSOR_NAMES[section], tensor)
    for model in _DOCUMENTS:
        for section in model.tensor_sections:
            if section not in _SECTIONS_WITH_DOCUMENT:
                place = {"type": "object", "additionalProperties": tensor}
                schemas[model.__name__]["properties"][section] = place
    return schemas | {"Tensor": _TENSOR, "Problem": _PROBLEM}
