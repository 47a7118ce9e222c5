"""The head of a reply, and a body that is chunked, by httptools (llhttp, in C)."""

from __future__ import annotations

import httptools
import httpx

MOST_HEAD_BYTES = 256 * 1024


class Head:
    """What httptools tells of a reply."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.pieces: list[bytes] = []
        self.is_read = self.is_complete = self.is_followed = False
        self.is_kept_alive, self.status_code = False, 0
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """Read on.

        Raises:
            httpx.RemoteProtocolError: it is no HTTP.
        """
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise httpx.RemoteProtocolError(f"the reply is not HTTP: {error}") from error

    def on_message_begin(self) -> None:
        """A reply begins: the one that was asked for, or another behind it."""
        self.is_followed = self.is_read
        if not self.is_followed:
            self.headers.clear()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header."""
        if not self.is_followed:
            self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """The head is read."""
        if not self.is_followed:
            self.status_code = int(self._parser.get_status_code())
            self.is_kept_alive = bool(self._parser.should_keep_alive())
            self.is_read = not 100 <= self.status_code < 200  # an interim reply is not the reply

    def on_body(self, piece: bytes) -> None:
        """A piece of the body."""
        if not self.is_followed:
            self.pieces.append(piece)

    def on_message_complete(self) -> None:
        """The body is read, where the parser sees its end."""
        self.is_complete = self.is_read

    @property
    def is_reusable(self) -> bool:
        """Whether the connection may carry another call; not if more came than was asked for."""
        return self.is_kept_alive and not self.is_followed

    @property
    def length(self) -> int | None:
        """Content-Length of a body that is not chunked."""
        text = self.headers.get("content-length", "")
        return int(text) if text.isdigit() and "transfer-encoding" not in self.headers else None
