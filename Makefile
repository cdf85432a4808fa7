# Every task of this project. `make` alone lists them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
PYTEST := $(BIN)/pytest $(PYTEST_ARGS)
CLUSTER := $(BIN)/python tests/cluster/cluster.py

##@ Begin here

.PHONY: help
help: ## list the tasks
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@printf '\nOne test:  $(BIN)/pytest tests/relay -k name       Python other than python3:  make setup PYTHON=python3.13\n'

.PHONY: setup
setup: ## make .venv from the lock file (quick when nothing changed)
	@tools/setup

.PHONY: demo
demo: setup ## send sample mail through a relay on this machine and watch what becomes of it
	$(BIN)/mailsluice demo

##@ Check

.PHONY: lint
lint: setup ## style, types, layers, and whether generated files are current
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	MYPYPATH=tests/cluster $(BIN)/mypy -p benchmarks
	MYPYPATH=tests/cluster $(BIN)/mypy --explicit-package-bases tests/cluster
	MYPYPATH=tests/interop $(BIN)/mypy --explicit-package-bases tests/interop/test_dialogues.py
	$(BIN)/lint-imports
	@wanted=$$(mktemp -d); trap "rm -rf $$wanted" EXIT; $(BIN)/python -m mailsluice_operator.resource.crd $$wanted >/dev/null; \
	  diff -ru crds $$wanted || { echo 'crds/ is not what the models say: make crds'; exit 1; }

.PHONY: test
test: lint ## lint, then every test that needs no root, those with a Kubernetes API server included
	$(PYTEST) -m "not node and not interop"

.PHONY: test-node
test-node: setup ## the tests on a real one-node cluster (root)
	$(PYTEST) -m node

.PHONY: test-interop
test-interop: setup ## against other mail software: servers, clients, HAProxy, aiosmtpd's suite (root)
	tools/interop-servers
	tools/interop-clients
	$(PYTEST) -m interop tests/interop

.PHONY: test-all
test-all: test test-interop test-node ## everything (root)

FUZZ := $(BIN)/python tests/fuzz/fuzz_engine.py build/fuzz tests/fuzz/corpus -artifact_prefix=build/fuzz- -timeout=20 -max_len=4096

.PHONY: fuzz
fuzz: setup ## look for octets that break the parsers, the engine or a session (10 minutes)
	@mkdir -p build/fuzz
	$(FUZZ) -max_total_time=600

.PHONY: fuzz-short
fuzz-short: setup ## the same for a minute, the corpus first
	@mkdir -p build/fuzz
	$(FUZZ) -max_total_time=60

##@ Measure

.PHONY: bench
bench: setup ## measure beside Postfix, Haraka and aiosmtpd; fails below the floor (Debian's postfix; root for Postfix itself)
	$(BIN)/python -m benchmarks

.PHONY: bench-short
bench-short: setup ## the same in less than a minute, to see that it runs: no floor
	$(BIN)/python -m benchmarks --short

.PHONY: bench-operator
bench-operator: setup ## how fast an operator catches up over 1,000 relays (about 10 minutes)
	$(BIN)/python -m benchmarks.operator_restart

.PHONY: kills
kills: setup ## kill -9 under load 200 times: nothing that got 250 is lost (about 10 minutes)
	MAILSLUICE_KILLS=100 $(PYTEST) tests/relay/delivery/test_delivery_killed.py --timeout=3000

##@ Build

.PHONY: image
image: ## build both container images as OCI archives in build/images (root, buildah)
	tools/build-images

.PHONY: crds
crds: setup ## write crds/ from the models
	$(BIN)/python -m mailsluice_operator.resource.crd crds

.PHONY: dialogues
dialogues: setup ## write docs/dialogue-differences.md from what the other servers answer (root)
	tools/interop-servers
	$(BIN)/python tests/interop/differences.py

.PHONY: lock
lock: setup ## resolve pyproject.toml into the lock files again
	tools/lock

##@ A cluster on this machine

.PHONY: cluster-build
cluster-build: setup ## build Kubernetes' programs (once, 20 to 25 minutes; the tests do it too when they need it)
	$(CLUSTER) build

.PHONY: cluster-up
cluster-up: cluster-build ## a cluster with one node (root); prints its kubeconfig
	$(CLUSTER) up

.PHONY: cluster-down
cluster-down: setup ## end that cluster
	$(CLUSTER) down

.PHONY: clean
clean: ## remove what was built here, .venv included
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
