"""CPU inner loops: numba over LAPACK, one problem at a time, without Python's lock.

Kernels are compiled with `nogil` and never `parallel=True`: numba's own threads die after a fork and refuse concurrent
callers. Our thread pool (`pool`) splits the batch. No fastmath: tests for NaN would vanish. Addresses of LAPACK
routines are run-time arguments, so that what is compiled is cached on disk: where NUMBA_CACHE_DIR says, else beside
these files, else, where they are read-only, in the user's cache, else in a folder of this process that goes with it.
"""

import atexit
import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
from pathlib import Path


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for source in sorted(folder.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _drop_stale(folder: Path) -> None:
    """Empty the cache after any kernel has changed: numba looks at a function's own file only, not at what it calls."""
    digest = _digest(folder)
    cache, marker = folder / "__pycache__", folder / "__pycache__" / "kernels.sha256"
    with contextlib.suppress(OSError):
        if marker.exists() and marker.read_text() == digest:
            return
        for compiled in [*cache.glob("*.nbi"), *cache.glob("*.nbc")]:
            compiled.unlink(missing_ok=True)
        cache.mkdir(exist_ok=True)
        marker.write_text(digest)


def _folder_elsewhere(source: Path) -> str:
    """A folder that nobody else can write to: what is cached is executed."""
    with contextlib.suppress(OSError, RuntimeError):  # no home, or a read-only one
        given = os.environ.get("XDG_CACHE_HOME")
        folder = (Path(given) if given else Path.home() / ".cache") / "argrad" / f"kernels-{_digest(source)[:16]}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        is_own = found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) & 0o022 == 0
        if is_own and os.access(folder, os.W_OK):
            return str(folder)
    made = tempfile.mkdtemp(prefix="argrad-kernels-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


if "NUMBA_CACHE_DIR" not in os.environ:
    _folder = Path(__file__).parent
    if os.access(_folder, os.W_OK):
        _drop_stale(_folder)
    else:
        os.environ["NUMBA_CACHE_DIR"] = _folder_elsewhere(_folder)  # read when numba is imported
