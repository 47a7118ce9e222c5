"""CPU inner loops: numba over LAPACK, one problem at a time, without Python's lock.

Kernels are compiled with `nogil` and never `parallel=True`: numba's own threads die after a fork and refuse concurrent
callers. Our thread pool (`pool`) splits the batch. No fastmath: tests for NaN would vanish. Addresses of LAPACK
routines are run-time arguments, so that what is compiled is cached on disk: beside these files, or where
NUMBA_CACHE_DIR says. Where neither can be written, this process compiles for itself alone.
"""

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path


def _drop_stale(folder: Path) -> None:
    """Empty the cache after any kernel has changed: numba looks at a function's own file only, not at what it calls."""
    digest = hashlib.sha256()
    for source in sorted(folder.glob("*.py")):
        digest.update(source.read_bytes())
    cache, marker = folder / "__pycache__", folder / "__pycache__" / "kernels.sha256"
    with contextlib.suppress(OSError):
        if marker.exists() and marker.read_text() == digest.hexdigest():
            return
        for compiled in [*cache.glob("*.nbi"), *cache.glob("*.nbc")]:
            compiled.unlink(missing_ok=True)
        cache.mkdir(exist_ok=True)
        marker.write_text(digest.hexdigest())


if "NUMBA_CACHE_DIR" not in os.environ:
    _folder = Path(__file__).parent
    if os.access(_folder, os.W_OK):
        _drop_stale(_folder)
    else:
        # Read when numba is imported. A new folder: what is cached is executed, so nobody else may have filled it.
        os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp(prefix="argrad-kernels-")
