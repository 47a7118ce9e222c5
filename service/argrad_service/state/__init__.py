"""What the service keeps between calls: a cache, and never a correctness dependency."""

from argrad_service.state.alone import MemoryShared
from argrad_service.state.memory import MemoryProblemStore, MemoryStateStore
from argrad_service.state.rates import MemoryRateCounter, RateCounter
from argrad_service.state.shared import (
    MAX_REPLY_BYTES,
    Claim,
    IdempotencyInProgress,
    IdempotencyMismatch,
    Replica,
    Shared,
    SharedHealth,
)
from argrad_service.state.store import ProblemGone, ProblemStore, StateGone, StateStore
from argrad_service.state.tokens import TOKEN_LENGTH, Seal, TokenSigner

__all__ = [
    "MAX_REPLY_BYTES",
    "TOKEN_LENGTH",
    "Claim",
    "IdempotencyInProgress",
    "IdempotencyMismatch",
    "MemoryProblemStore",
    "MemoryRateCounter",
    "MemoryShared",
    "MemoryStateStore",
    "ProblemGone",
    "ProblemStore",
    "RateCounter",
    "Replica",
    "Seal",
    "Shared",
    "SharedHealth",
    "StateGone",
    "StateStore",
    "TokenSigner",
]
