"""CPU inner loops: numba over LAPACK, one problem at a time, without Python's lock.

Kernels are compiled with `nogil` and never `parallel=True`: numba's own threads die after a fork and refuse concurrent
callers. Our thread pool (`pool`) splits the batch. No fastmath: tests for NaN would vanish. Addresses of LAPACK
routines are run-time arguments, so that what is compiled is cached on disk: beside these files, or where
NUMBA_CACHE_DIR says. Where neither can be written, this process compiles for itself alone.
"""

import os
import tempfile
from pathlib import Path

if "NUMBA_CACHE_DIR" not in os.environ and not os.access(Path(__file__).parent, os.W_OK):
    # Read when numba is imported. A folder of our own: what is cached is executed, so nobody else may have filled it.
    os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp(prefix="argrad-kernels-")
