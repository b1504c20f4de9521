# Two commands do everything on a fresh machine: make run, make test. Both install first, if needed.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Settings of `make run`, e.g. make run RUN_CONFIG='seed=1 alpha=0.1' or PRESET=cifar10-homo-a1
RUN_CONFIG ?=
PRESET ?=
OUTPUT_DIR ?= runs
CLIENT_GPUS ?= 0
# A run's folder, to go on with it: make run RESUME=runs/NAME
RESUME ?=

.PHONY: browser proxy test-slow test-faults deploy-demo docs help run install test check lint types clean

help:
	@echo "make run      install, then run FedZGE on handwritten digits in simulation"
	@echo "make deploy-demo  install, then the same on a SuperLink and 3 SuperNodes with TLS and authentication"
	@echo "make test     install, then the test suite"
	@echo "make test-slow  a Ray cluster, the examples, and measurements of costs"
	@echo "make test-faults  real deployments, killed processes, clients that fail or misbehave"
	@echo "make check    lint, types, tests"
	@echo "make docs     install, then the documentation as a site in site/"
	@echo "make install  only the set-up in $(VENV)"

run: $(STAMP)
	@$(BIN)/fedzge run --app . --output-dir '$(OUTPUT_DIR)' --client-gpus $(CLIENT_GPUS) \
		$(if $(PRESET),--preset '$(PRESET)') $(if $(RUN_CONFIG),--run-config '$(RUN_CONFIG)') \
		$(if $(RESUME),--resume '$(RESUME)')

# A message to a node takes seconds, so there are few rounds; RUN_CONFIG may say otherwise.
deploy-demo: $(STAMP)
	@$(BIN)/fedzge run --deployment --app . --output-dir '$(OUTPUT_DIR)' \
		$(if $(PRESET),--preset '$(PRESET)') --run-config 'num-clients=3 num-server-rounds=3' \
		$(if $(RUN_CONFIG),--run-config '$(RUN_CONFIG)')

install: $(STAMP)

# All is compiled, on all cores, where pip has one: where PYTHONDONTWRITEBYTECODE is set, as in many
# images, every process would otherwise compile PyTorch anew. Some packages have files that are not
# meant to be.
$(STAMP): pyproject.toml
	@test -n '$(PYTHON)' || { echo "error: no Python 3.11, 3.12 or 3.13 found: install one, or make PYTHON=/path/to/python"; exit 1; }
	@echo "installing into $(VENV) with $$($(PYTHON) --version) (PyTorch is several GB: minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on --no-compile --editable '.[dev]'
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@$(BIN)/python -c 'import torch, torchvision' || { echo "error: torch and torchvision in $(VENV) do not match: rm -r $(VENV), then make install with both from one package index"; exit 1; }
	@touch $(STAMP)

# The report is looked at in Chromium, by whoever has it or may install it.
browser:
	@command -v chromium chromium-browser >/dev/null || test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null || \
		{ echo "installing chromium for the tests of the report"; \
		  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium >/dev/null; } || \
		echo "no chromium: the tests that need one are skipped"

# What passes nodes to a SuperLink is tested with the proxy itself, likewise. The policy keeps Debian
# from starting a web server.
proxy:
	@command -v nginx >/dev/null || test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null || \
		{ echo "installing nginx for the test of deploy/proxy.sh"; policy=/usr/sbin/policy-rc.d; \
		  test -e $$policy || { trap "rm -f $$policy" EXIT; printf '#!/bin/sh\nexit 101\n' >$$policy; chmod +x $$policy; }; \
		  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends nginx-light >/dev/null; } || \
		echo "no nginx: the test that needs it is skipped"

# One worker a core, up to four: the tests of a file stay together. In the order of the files: by
# number of tests, the few that take minutes would come last, and alone.
test: $(STAMP) browser
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations=12

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# More workers than cores: a deployment spends most of its time between two polls.
test-faults: $(STAMP) proxy
	$(BIN)/python -m pytest -m faults -n 4 --dist loadfile --no-loadscope-reorder --durations=12

# Fails on a link that leads nowhere. The variable turns off an advertisement.
docs: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "to read it: $(BIN)/python -m http.server --bind 127.0.0.1 --directory site"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

check: lint types test

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist site *.egg-info
