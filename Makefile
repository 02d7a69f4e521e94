# Everything a user or developer runs; `make help` lists it.
PYTHON ?= python3
# The tests, on any machine, and the CPU variant of `make up`.
VENV ?= .venv
# The CPU build of vLLM unless there is an NVIDIA GPU. The builds are one import package, so each has its environment.
VARIANT ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
RUNTIME_VENV := $(if $(filter gpu,$(VARIANT)),$(VENV)-gpu,$(VENV))
BIN := $(VENV)/bin
ARGS ?=
# Debian's, for tests with a load balancer in front, network namespaces, and a store that outlives Ray's head.
SYSTEM_PACKAGES := haproxy iproute2 redis-server

digest = $(shell cat $(1) | sha256sum | cut -c1-16)
RUNTIME_STAMP := $(RUNTIME_VENV)/.installed-$(VARIANT)-$(call digest,requirements/$(VARIANT).txt)
DEV_STAMP := $(VENV)/.installed-dev-$(call digest,requirements/dev.txt)
CPU_STAMP := $(VENV)/.installed-cpu-$(call digest,requirements/cpu.txt)
# The project itself, editable; again only when the checkout, its metadata or what is compiled of it is another one.
SOURCE := $(CURDIR) $(call digest,pyproject.toml setup.py $(shell find router engine -name '*.p[yx][xd]' | sort))

# The stamp in build/ says that this very checkout has its compiled parts, which lie beside their sources.
install_source = @[ "$$(cat $(1)/.source 2>/dev/null)" = "$(SOURCE)" ] && [ -e build/.installed ] || { \
  find router engine -name '*.so' -delete && $(1)/bin/python -m pip install --quiet --no-deps --no-build-isolation -e . && \
  echo "$(SOURCE)" > $(1)/.source && mkdir -p build && touch build/.installed; }

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

.PHONY: up
up: $(RUNTIME_STAMP) ## real vLLM replicas behind the router, with a streamed demo; ARGS=--once ends after it
	$(call install_source,$(RUNTIME_VENV))
	$(RUNTIME_VENV)/bin/kvlane up $(ARGS)

.PHONY: system
system: ## install the Debian packages that some tests need; as root, or with sudo
	@missing=$$(for each in $(SYSTEM_PACKAGES); do dpkg -s $$each >/dev/null 2>&1 || echo $$each; done); \
	[ -n "$$missing" ] || exit 0; \
	if [ "$$(id -u)" = 0 ]; then sudo=; elif sudo -n true 2>/dev/null; then sudo=sudo; \
	else echo "not installed, and nobody here may: "$$missing"; tests that need it are skipped" >&2; exit 0; fi; \
	$$sudo apt-get update -qq && \
	$$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null

.PHONY: test
test: system $(DEV_STAMP) ## every test, two at a time
	$(call install_source,$(VENV))
	$(BIN)/python -m pytest -n 2 --dist loadscope $(ARGS)

.PHONY: test-fast
# With bytecode even where the environment forbids it: else both processes rewrite and compile each test anew, for 9 s.
test-fast: $(DEV_STAMP) ## the tests that need neither Ray nor vLLM, in under a minute
	$(call install_source,$(VENV))
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n 3 --dist worksteal \
	  -m "not slow and not ray and not vllm" --hypothesis-profile=fast $(ARGS)

.PHONY: check
check: $(DEV_STAMP) ## format, lint, types, protobuf drift
	$(call install_source,$(VENV))
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python protos/generate.py --check

.PHONY: build
build: $(DEV_STAMP) ## compile anew what there is as C too, after an edit of a .pyx file
	KVLANE_COMPILED=1 $(BIN)/python setup.py --quiet build_ext --inplace --force

.PHONY: format
format: $(DEV_STAMP) ## format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: protos
protos: $(DEV_STAMP) ## generate the protobuf code anew
	$(BIN)/python protos/generate.py

.PHONY: bench
bench: $(DEV_STAMP) ## kvlane beside other routers on the same load; ARGS as in `python -m loadtests peers --help`
	$(call install_source,$(VENV))
	$(BIN)/python -m loadtests peers $(or $(ARGS),--quick)

.PHONY: bench-router
bench-router: $(DEV_STAMP) ## kvlane alone: CPU per chunk and per request, added time to first token
	$(call install_source,$(VENV))
	$(BIN)/python -m loadtests.router_cost $(ARGS)

.PHONY: bench-routing
bench-routing: $(DEV_STAMP) ## cost of hashing, index and a whole routing decision
	$(call install_source,$(VENV))
	$(BIN)/python -m loadtests.index_cost
	$(BIN)/python -m loadtests.routing_cost

.PHONY: profile
profile: $(DEV_STAMP) ## flame graphs of router and replica under load, into build/profiles
	$(call install_source,$(VENV))
	$(BIN)/python -m loadtests profile $(ARGS)

.PHONY: simulate
simulate: $(DEV_STAMP) ## routing policies on real traces; ARGS as in `python -m loadtests simulate --help`
	$(call install_source,$(VENV))
	$(BIN)/python -m loadtests simulate $(or $(ARGS),--trace synthetic --load 0.8 --policies cost,least-queue)

.PHONY: k8s-check
k8s-check: $(DEV_STAMP) ## the Kubernetes manifests, without a cluster; needs kubectl or kustomize. ARGS=DIRECTORY for yours
	$(call install_source,$(VENV))
	$(BIN)/python -m k8s.check $(ARGS)

.PHONY: lock
lock: ## resolve the requirement locks anew; needs uv on the PATH
	sh requirements/lock.sh

.PHONY: clean
clean: ## remove what the other targets made
	find router engine -name '*.so' -delete
	rm -rf $(VENV) $(VENV)-gpu .bench build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

%/bin/python:
	$(PYTHON) -m venv $*

# What a lock leaves out stays out: no dependency is installed that it does not name. A stamp says what the environment
# holds now, so installing one thing takes the stamps of others away.
$(RUNTIME_STAMP): | $(RUNTIME_VENV)/bin/python
	@rm -f $(RUNTIME_VENV)/.installed-*
	$(RUNTIME_VENV)/bin/python -m pip install --quiet --no-deps -r requirements/$(VARIANT).txt
	@touch $@

# The development lock holds the whole CPU lock.
$(DEV_STAMP): | $(VENV)/bin/python
	@rm -f $(VENV)/.installed-*
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/dev.txt
	@touch $@ $(CPU_STAMP)
