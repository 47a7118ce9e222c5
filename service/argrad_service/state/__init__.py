"""Forward state between a solve and its vjp: a cache, and never a correctness dependency."""

from argrad_service.state.memory import MemoryStateStore
from argrad_service.state.store import StateGone, StateStore
from argrad_service.state.tokens import TOKEN_LENGTH, TokenSigner

__all__ = ["TOKEN_LENGTH", "MemoryStateStore", "StateGone", "StateStore", "TokenSigner"]
