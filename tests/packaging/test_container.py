"""The Dockerfile, checked by what can run without a container engine."""

import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, continuation lines joined."""
    lines = "\n".join(line for line in DOCKERFILE.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", "", lines)
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())]


def last_stage() -> list[tuple[str, str]]:
    steps = instructions()
    start = max(i for i, (word, _) in enumerate(steps) if word == "FROM")
    return steps[start:]


def copied_from_context() -> list[list[str]]:
    """Sources of each COPY that reads the build context, in order."""
    return [rest.split()[:-1] for word, rest in instructions() if word == "COPY" and not rest.startswith("--from")]


@pytest.mark.parametrize("path", ["Dockerfile", "deploy/caddy/Dockerfile"])
def test_hadolint_finds_nothing(path):
    hadolint = shutil.which("hadolint", path=str(BIN))
    if hadolint is None:
        pytest.skip("hadolint has no wheel for this platform; runs on Linux x86-64")
    done = subprocess.run([hadolint, ROOT / path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_image_is_built_in_two_stages_and_runs_as_nobody_special():
    assert [word for word, _ in instructions()].count("FROM") == 2
    users = [rest for word, rest in last_stage() if word == "USER"]
    assert users == ["10001:10001"]
    assert not any("chown" in rest for _, rest in last_stage()), "the service must not own its own files"


def test_image_has_a_health_check_and_stops_on_the_signal_the_service_handles():
    steps = dict(last_stage())
    assert "/health/ready" in steps["HEALTHCHECK"]
    assert steps["STOPSIGNAL"] == "SIGTERM"
    assert (steps["ENTRYPOINT"], steps["CMD"]) == ('["argrad"]', '["serve"]'), (
        "the exec form: signals reach the service"
    )


def test_image_asks_for_keys_unless_its_user_says_otherwise():
    settings = next(rest for word, rest in last_stage() if word == "ENV")
    assert "ARGRAD_HOST=0.0.0.0" in settings
    assert not re.search("ARGRAD_(INSECURE|API_KEYS)", settings)
    environment = {"ARGRAD_HOST": "0.0.0.0", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    done = subprocess.run(
        [sys.executable, "-m", "argrad_service"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "ARGRAD_HOST is '0.0.0.0', which others may reach, and nobody is asked for an API key" in done.stderr


def test_image_installs_by_the_makefile_own_target_in_both_variants():
    (install,) = [rest for word, rest in instructions() if word == "RUN" and "VARIANT" in rest]
    assert "cpu) make install-service ;;" in install
    assert "cuda) make install-service TORCH= ;;" in install
    assert "pip install" not in DOCKERFILE
    planned = subprocess.run(
        ["make", "--dry-run", "install-service", "VENV=/nonexistent/venv"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "pip --disable-pip-version-check install --quiet --constraint constraints-cpu.txt" in planned.stdout


def test_image_has_its_kernels_compiled_after_all_that_changes_their_time():
    steps = [rest for word, rest in instructions() if word in {"COPY", "RUN"}]
    (compiles,) = [i for i, rest in enumerate(steps) if "argrad_service.warming --for-image" in rest]
    assert compiles > steps.index("service service")
    assert re.search(r"find client service .* touch --date=\S+00Z .*warming --for-image", steps[compiles])
    assert steps[compiles + 1 :] == [rest for word, rest in last_stage() if word in {"COPY", "RUN"}]
    assert not any("NUMBA" in rest for word, rest in instructions() if word == "ENV"), "it finds them by itself"


def test_everything_the_image_copies_exists_and_is_not_ignored():
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for source in (s for sources in copied_from_context() for s in sources):
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source, k) or source.startswith(f"{k}/") for k in kept), f"{source} is ignored"


def test_the_dependency_layer_holds_all_that_the_build_backend_reads(tmp_path):
    copies = [rest.split() for word, rest in instructions() if word == "COPY" and not rest.startswith("--from")]
    for *sources, target in copies[:3]:
        for source in sources:
            place = tmp_path / (source if target == "./" else target)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, place)
    script = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"argrad-[\d.]+-py3-none-any.whl\n", done.stdout)
