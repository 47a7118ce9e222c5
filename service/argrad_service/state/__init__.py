"""What the service keeps between calls: a cache, and never a correctness dependency."""

from argrad_service.state.memory import MemoryProblemStore, MemoryStateStore
from argrad_service.state.rates import MemoryRateCounter, RateCounter
from argrad_service.state.store import ProblemGone, ProblemStore, StateGone, StateStore
from argrad_service.state.tokens import TOKEN_LENGTH, TokenSigner

__all__ = [
    "TOKEN_LENGTH",
    "MemoryProblemStore",
    "MemoryRateCounter",
    "MemoryStateStore",
    "ProblemGone",
    "ProblemStore",
    "RateCounter",
    "StateGone",
    "StateStore",
    "TokenSigner",
]
