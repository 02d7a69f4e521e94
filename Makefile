# Everything a user or developer runs; `make help` lists it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The CPU build of vLLM unless there is an NVIDIA GPU.
VARIANT ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
ARGS ?=

digest = $(shell cat $(1) | sha256sum | cut -c1-16)
RUNTIME_STAMP := $(VENV)/.installed-$(VARIANT)-$(call digest,requirements/$(VARIANT).txt)
DEV_STAMP := $(VENV)/.installed-dev-$(call digest,requirements/dev.txt)
SOURCE := $(CURDIR) $(call digest,pyproject.toml)

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

.PHONY: up
up: $(RUNTIME_STAMP) source ## real vLLM replicas behind the router, with a streamed demo; ARGS=--once ends after it
	$(BIN)/kvlane up $(ARGS)

.PHONY: test
test: $(DEV_STAMP) source ## every test
	$(BIN)/python -m pytest $(ARGS)

.PHONY: test-fast
test-fast: $(DEV_STAMP) source ## the tests that need neither Ray nor vLLM, in under a minute
	$(BIN)/python -m pytest -m "not slow and not ray and not vllm" $(ARGS)

.PHONY: check
check: $(DEV_STAMP) source ## format, lint, types, protobuf drift
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python protos/generate.py --check

.PHONY: format
format: $(DEV_STAMP) ## format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: protos
protos: $(DEV_STAMP) ## generate the protobuf code anew
	$(BIN)/python protos/generate.py

.PHONY: bench
bench: $(DEV_STAMP) source ## CPU per chunk and per request, added time to first token
	$(BIN)/python -m loadtests.router_cost $(ARGS)

.PHONY: lock
lock: ## resolve the requirement locks anew; needs uv on the PATH
	sh requirements/lock.sh

.PHONY: clean
clean: ## remove what the other targets made
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# What a lock leaves out stays out: no dependency is installed that it does not name.
$(RUNTIME_STAMP): | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/$(VARIANT).txt
	@touch $@

$(DEV_STAMP): | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/dev.txt
	@touch $@

# The project itself, editable; again only when the checkout or its metadata is another one.
.PHONY: source
source: | $(BIN)/python
	@[ "$$(cat $(VENV)/.source 2>/dev/null)" = "$(SOURCE)" ] || { \
	  $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e . && echo "$(SOURCE)" > $(VENV)/.source; }
