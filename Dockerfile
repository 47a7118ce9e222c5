# syntax=docker/dockerfile:1
#
#   docker build -t argrad .                              CPU
#   docker build -t argrad:cuda --build-arg VARIANT=cuda .   CUDA; run with the NVIDIA container runtime
#
# It listens on every address, and so refuses to start without API keys: `argrad keys new NAME` makes one, and
#   docker run -p 127.0.0.1:8000:8000 -e ARGRAD_API_KEYS=NAME:SHA256 argrad
# or, where nobody but those who may call reaches the container, -e ARGRAD_INSECURE=true.
#
# Where pip finds its packages is pip's own business: PIP_INDEX_URL and PIP_EXTRA_INDEX_URL are passed on, for a mirror,
# or for an index with torch's CPU builds, which spare the CPU image some gigabytes.

ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim-bookworm AS build
ARG VARIANT=cpu
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
SHELL ["/bin/bash", "-eu", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /app
# What pip reads of the project: dependencies are a layer of their own, which a change of code leaves alone.
COPY pyproject.toml constraints-cpu.txt Makefile README.md LICENSE ./
COPY client/argrad/_version.py client/argrad/_version.py
COPY service/argrad_service/__init__.py service/argrad_service/__init__.py
RUN case "$VARIANT" in \
      cpu) make install-service ;; \
      cuda) make install-service TORCH= ;; \
      *) echo "VARIANT is cpu or cuda, not $VARIANT" >&2; exit 1 ;; \
    esac
COPY client client
COPY service service
# Kernels are compiled here, for any processor of this kind, and not in each container at its start. What is cached knows
# the time of its source, and layers keep whole seconds.
RUN find client service -name '*.py' -exec touch --date=2020-01-01T00:00:00Z {} + \
 && .venv/bin/python -m compileall -q client service \
 && .venv/bin/python -m argrad_service.warming --for-image

FROM python:${PYTHON_VERSION}-slim-bookworm
LABEL org.opencontainers.image.title="argrad" \
      org.opencontainers.image.description="Gradients of optimisation problems, served" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --system --gid 10001 argrad && useradd --system --uid 10001 --gid argrad --no-create-home argrad
# The files stay root's: the service can read them and write nowhere but under /tmp.
COPY --from=build /app /app
WORKDIR /app
ENV ARGRAD_HOST=0.0.0.0 \
    ARGRAD_PORT=8000 \
    PATH=/app/.venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=90s --retries=3 \
  CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['ARGRAD_PORT'] + '/health/ready', timeout=4)"]
ENTRYPOINT ["argrad"]
CMD ["serve"]
