# Every target sets up what it needs; `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := $(wildcard packages/*)
STAMP := $(VENV)/.stamp
WS16 := $(VENV)/websockets16
ARGS ?=
SEEDS ?= 1000
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

export URL IMAGE TOKEN

.PHONY: help setup system demo test lint bench simulate chaos cycles runtime-image attest-matrix mitm vmm-conformance values-drill update-drill docs lock clean hosts-demo qemu-demo canary hostile

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(STAMP) ## install the locked dependencies and the five packages into .venv

$(STAMP): requirements.lock $(addsuffix /pyproject.toml,$(PACKAGES))
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not on PATH. Expected Python 3.11 or newer with venv: install it (Debian: apt install python3.11 python3.11-venv) or name yours: make setup PYTHON=python3.12" >&2; exit 2; }
	@echo "setup: creating .venv and installing $$(grep -c == requirements.lock) locked packages, each checked against its hash (needs the package index; nothing outside .venv is touched)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# --no-deps: the lock is complete (pip check says so), and older pips look past it for what is asked for with extras.
	@$(BIN)/python -m pip install --quiet --progress-bar off --no-deps --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation $(foreach p,$(PACKAGES),-e $(p))
	@$(BIN)/python -m pip check
	@touch $(STAMP)
	@echo "setup: done"

system: ## install bubblewrap, packet filters, git and jq (Debian or Ubuntu, as root), or say how
	@bash scripts/system.sh bubblewrap nftables git iptables iproute2 jq

demo: setup system ## run the whole job on this machine; ARGS=--keep, ARGS="--outage 10"
	@$(BIN)/python -m examples.demo $(ARGS)

qemu-demo: setup system ## the demo on virtual machines (QEMU), with fewer submissions
	@bash scripts/system.sh squashfs-tools qemu-system-x86
	@$(BIN)/python -m examples.demo --image local-qemu $(ARGS)

hosts-demo: setup system ## two VMMs of different size, one killed in the middle; ARGS=--short
	@$(BIN)/python -m examples.demo.hosts $(ARGS)

test: setup system $(WS16)/.stamp ## all tests; ARGS="-k lease" narrows them
	@bash scripts/system.sh squashfs-tools qemu-system-x86 skopeo nodejs libseccomp2
	@$(BIN)/platform-vmm image build --prune --state-dir .cache/platform-vmm
	@$(BIN)/python -m pytest -n 2 --ignore tests/e2e/test_demo.py $(ARGS)
	@echo "test: the whole system, one run at a time"
	@$(BIN)/python -m pytest -q tests/e2e/test_demo.py
	@echo "test: the session tests once more, with websockets 16"
	@PYTHONPATH=$(WS16) $(BIN)/python -m pytest -q tests/interop/session

$(WS16)/.stamp: tests/interop/websockets16.lock $(STAMP)
	@$(BIN)/python -m pip install --quiet --progress-bar off --no-deps --require-hashes --upgrade --target $(WS16) -r $<
	@touch $@

lint: setup ## ruff, mypy strict, import contracts
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/mypy packages tests bench examples
	@$(BIN)/lint-imports

bench: setup system ## measure, beside something real in the same run
	@$(BIN)/python -m bench.sandbox_start $(ARGS)
	@bash scripts/system.sh squashfs-tools qemu-system-x86
	@$(BIN)/python -m bench.guest_start
	@$(BIN)/python -m bench.large_result
	@$(BIN)/python -m bench.journal_year --jobs 10000
	@$(BIN)/python -m bench.values_rate
	@$(BIN)/python -m bench.ready_pool

simulate: setup ## the daemon on a virtual clock under seeded faults; SEEDS=1000, ARGS="--seed 11" replays
	@$(BIN)/python -m tests.simulation --seeds $(SEEDS) $(ARGS)

chaos: setup system ## real processes under kill -9, SIGSTOP and a failing network; ARGS="--seed 2", ARGS=--short
	@$(BIN)/python -m tests.chaos $(ARGS)

cycles: setup system ## make and destroy 2,000 sandboxes and count what is left; ARGS="--cycles 200"
	@$(BIN)/python -m tests.cycles $(ARGS)

runtime-image: setup ## the runtime image of dstack hosts as an OCI layout in dist/, made twice; ARGS=--update
	@bash scripts/system.sh squashfs-tools
	@rm -rf dist/platform-runtime
	@$(BIN)/platform-vmm image build --check --json --state-dir .cache/platform-vmm --output dist/platform-runtime $(ARGS)

attest-matrix: setup ## every check of attestation against real and generated quotes, honest and tampered
	@$(BIN)/python -m tests.attestation

mitm: setup ## a man in the middle, as a process, between validator and challenge; ARGS=--short, ARGS="--only replay"
	@$(BIN)/python -m tests.mitm $(ARGS)

vmm-conformance: setup ## judge a VMM: URL=… IMAGE=… [TOKEN=…] [ARGS=--start]; makes only stopped VMs
	@: $${URL:?URL=… the VMM: http, https or unix:} $${IMAGE:?IMAGE=… the image of which VMs are made}
	@DSTACK_VMM_TOKEN="$${TOKEN:-$${DSTACK_VMM_TOKEN:-}}" $(BIN)/validator vmm conformance --url "$$URL" --image "$$IMAGE" $(ARGS)

values-drill: setup system ## 10,000 increments from 20 CVMs across a kill -9 of the validator
	@$(BIN)/python -m tests.drills.values $(ARGS)

update-drill: setup system ## three commits (good, broken, good) while 200 jobs flow, in both modes of cvm
	@$(BIN)/python -m tests.drills.updates $(ARGS)

canary: setup system ## secrets of every kind over a full run, and a search for them in everything that is left
	@$(BIN)/python -m tests.canary $(ARGS)

hostile: setup system ## attacks on a running system, each beside a control; ARGS=--list, ARGS="--only fork"
	@$(BIN)/python -m tests.hostile $(ARGS)

docs: setup ## check the pages' links and commands; write docs/openapi.json
	@$(BIN)/python scripts/openapi.py docs/openapi.json
	@$(BIN)/python -m pytest -q tests/e2e/test_docs.py

lock: ## make requirements.lock anew (needs uv)
	uv pip compile --universal --generate-hashes --no-emit-index-url --no-header --no-annotate --python-version 3.11 \
	  --group dev packages/*/pyproject.toml --extra signing --extra receipts $(foreach p,$(PACKAGES),--no-emit-package $(notdir $(p))) -o requirements.lock
	@$(BIN)/python scripts/image_lock.py
