"""CPU inner loops: numba over LAPACK, one problem at a time, without Python's lock.

Kernels are compiled with `nogil` and never `parallel=True`: numba's own threads die after a fork and refuse concurrent
callers. Our thread pool (`pool`) splits the batch. No fastmath: tests for NaN would vanish. Addresses of LAPACK
routines are run-time arguments, so that what is compiled is cached on disk: where NUMBA_CACHE_DIR says, else beside
these files, else, where they are read-only, in the user's cache, else in a folder of this process that goes with it.
An image has them compiled when it is built (`COMPILED`), for any processor of its kind: that folder is copied there.
"""

import atexit
import contextlib
import hashlib
import os
import platform
import shutil
import stat
import tempfile
from pathlib import Path

COMPILED = Path(__file__).parent / "compiled"
"""What was compiled when an image was built, for `portable()` processors; not there elsewhere."""

_KINDS = {
    "x86_64": (
        "x86-64-v3",
        frozenset({"avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "sse4.2", "xsave"}),
    ),
    "aarch64": ("generic", frozenset[str]()),
}
"""Processors by machine: name for the compiler, and what each of them has; all servers of the last ten years do."""


def portable() -> dict[str, str]:
    """Variables with which numba compiles for any processor of this one's kind; none where there is no such kind."""
    name, needed = _KINDS.get(platform.machine(), ("", ()))
    if not name:
        return {}
    from llvmlite.binding import get_host_cpu_features

    has = get_host_cpu_features()
    if not all(has.get(feature) for feature in needed):
        return {}
    return {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": ""}


def cache_folder() -> Path:
    """Where what is compiled is kept."""
    given = os.environ.get("NUMBA_CACHE_DIR")
    return Path(given) if given else Path(__file__).parent / "__pycache__"


def digest(folder: Path = Path(__file__).parent) -> str:
    """Digest of the files that have kernels: a change of the others compiles nothing again."""
    found = hashlib.sha256()
    for text in (source.read_bytes() for source in sorted(folder.glob("*.py"))):
        if b"\nfrom numba" in text:
            found.update(text)
    return found.hexdigest()


def _drop_stale(folder: Path) -> None:
    """Empty the cache after any kernel has changed: numba looks at a function's own file only, not at what it calls."""
    found = digest(folder)
    cache, marker = folder / "__pycache__", folder / "__pycache__" / "kernels.sha256"
    with contextlib.suppress(OSError):
        if marker.exists() and marker.read_text() == found:
            return
        for compiled in [*cache.glob("*.nbi"), *cache.glob("*.nbc")]:
            compiled.unlink(missing_ok=True)
        cache.mkdir(exist_ok=True)
        marker.write_text(found)


def _folder_elsewhere(source: Path) -> str:
    """A folder that nobody else can write to: what is cached is executed."""
    with contextlib.suppress(OSError, RuntimeError):  # no home, or a read-only one
        given = os.environ.get("XDG_CACHE_HOME")
        folder = (Path(given) if given else Path.home() / ".cache") / "argrad" / f"kernels-{digest(source)[:16]}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        is_own = found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) & 0o022 == 0
        if is_own and os.access(folder, os.W_OK):
            return str(folder)
    made = tempfile.mkdtemp(prefix="argrad-kernels-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def _take_compiled(folder: str) -> None:
    """Fill an empty cache from what was compiled for processors of this kind, and have numba compile for those."""
    variables = portable()
    if not COMPILED.is_dir() or not variables or os.environ.keys() & variables.keys():
        return
    os.environ.update(variables)
    if any(Path(folder).iterdir()):
        return
    for source in filter(Path.is_file, COMPILED.rglob("*")):
        target = folder / source.relative_to(COMPILED)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)  # without its mode: numba looks whether it may write


if "NUMBA_CACHE_DIR" not in os.environ:
    _folder = Path(__file__).parent
    if os.access(_folder, os.W_OK):
        _drop_stale(_folder)
    else:
        os.environ["NUMBA_CACHE_DIR"] = _folder_elsewhere(_folder)  # these are read when numba is imported
        _take_compiled(os.environ["NUMBA_CACHE_DIR"])
