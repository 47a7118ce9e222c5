"""Structured logs: one line an event, for people or as JSON."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any, TextIO

import structlog

from argrad_service.settings import Settings

Logger = structlog.typing.FilteringBoundLogger


def make_logger(settings: Settings, stream: TextIO | None = None) -> Logger:
    """A logger of its own, so that an application configures nothing global.

    Args:
        settings: Level and format.
        stream: Where lines go; standard error by default.
    """
    stream = stream or sys.stderr
    is_json = settings.log_format == "json"
    processors: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.dict_tracebacks if is_json else structlog.processors.format_exc_info,
        _as_json if is_json else _as_line,
    ]
    logger: Logger = structlog.wrap_logger(
        structlog.PrintLogger(stream),
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[settings.log_level.upper()]),
        cache_logger_on_first_use=True,
    ).bind()
    return logger


def _as_json(_: object, __: str, event: structlog.typing.EventDict) -> str:
    return json.dumps(event, default=str)  # not orjson: a line may quote what is no Unicode


def _as_line(_: object, __: str, event: structlog.typing.EventDict) -> str:
    """Time, level, event and `name=value` pairs; what is not plain is quoted, so that no value can fake a line."""
    head = f"{event.pop('timestamp')} {event.pop('level'):<7} {event.pop('event')}"
    traceback = event.pop("exception", None)
    pairs = [f"{name}={_quoted(value) if isinstance(value, str) else value}" for name, value in event.items()]
    return " ".join([head, *pairs]) + (f"\n{traceback}" if traceback else "")


def _quoted(text: str) -> str:
    return text if text.isprintable() and " " not in text else repr(text)


class Forwarded(logging.Handler):
    """Hands the standard library's log records on, so that uvicorn's lines look like ours."""

    def __init__(self, log: Logger) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Log one record."""
        self._log.log(record.levelno, record.getMessage(), source=record.name, exc_info=record.exc_info or None)
