"""How near two results are."""

from __future__ import annotations

import numpy as np
import torch


def relative(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """‖Δ‖ / √Σ‖ref‖² over all parameters; one that is zero counts in absolute terms."""
    size = np.sqrt(sum(float(np.sum(wanted[name] ** 2)) for name in found))
    return float(np.sqrt(sum(float(np.sum((found[k] - wanted[k]) ** 2)) for k in found)) / (size if size > 0 else 1.0))


def close(found: torch.Tensor, wanted: np.ndarray, slack: float, name: str) -> None:
    atol = slack * max(1.0, float(np.abs(wanted).max(initial=0.0)))
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=atol, err_msg=name)
