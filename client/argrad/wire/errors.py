"""What can be wrong with bytes that arrive, by what the service answers.

    WireError
    ├── UnreadableBodyError          400: not JSON, truncated, or a header that lies
    ├── TooLargeError                413: a JSON body over a limit
    ├── UnsupportedMediaTypeError    415: a Content-Type that no codec reads
    └── NotAcceptableError           406: an Accept header that no codec satisfies

A body that can be read and says something wrong is an `argrad.ProblemError` (422).
"""

from __future__ import annotations

from argrad.errors import ArgradError


class WireError(ArgradError):
    """Bytes or headers that cannot be used.

    Args:
        field: What is wrong: a part of the body, a tensor's dotted name, or an HTTP header.
        found: What was there, in words.
        wanted: What would have been accepted, in words.
    """

    def __init__(self, field: str, found: str, wanted: str) -> None:
        super().__init__(field, found, wanted)
        self.field, self.found, self.wanted = field, found, wanted

    def __str__(self) -> str:
        return f"{self.field}: found {self.found}, wanted {self.wanted}"


class UnreadableBodyError(WireError):
    """The body is not what its content type says."""


class TooLargeError(WireError):
    """The body is longer, or holds more, than JSON may here; the binary form has no such limit."""


class UnsupportedMediaTypeError(WireError):
    """No codec reads the body's content type."""


class NotAcceptableError(WireError):
    """No codec writes what the Accept header asks for."""
