"""qpth's layers, solved by argrad: change the import, and nothing else.

    from argrad.compat.qpth.qp import QPFunction, QPSolvers        # was: from qpth.qp import QPFunction, QPSolvers
    z = QPFunction(verbose=False)(Q, p, G, h, A, b)

What differs from qpth, on purpose: a coefficient that the batch shares receives the sum of its gradients, where qpth's
is their mean; a problem without a solution raises in place of returning the last iterate; solutions are those of the
exact active set, whatever `eps` says. docs/migrating-from-qpth.md has the list.

The interface is that of qpth 0.0.18 (B. Amos and J. Z. Kolter, OptNet, ICML 2017); the implementation shares nothing.
"""

from argrad.compat.qpth import qp
from argrad.compat.qpth.qp import QPFunction, QPSolvers, SpQPFunction

__all__ = ["QPFunction", "QPSolvers", "SpQPFunction", "qp"]
