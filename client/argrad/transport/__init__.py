"""Calls over HTTP: addresses, bodies, retries under one deadline, and errors by what the caller can do."""

from argrad.transport.aio import AsyncHttpBackend
from argrad.transport.http import HttpBackend

__all__ = ["AsyncHttpBackend", "HttpBackend"]
