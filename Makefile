# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A busy neighbour must not make worker threads spin.
export OMP_WAIT_POLICY ?= PASSIVE
# Tests that run at a time.
PROCESSES ?= 2
NEMO_RL_SRC ?= $(HOME)/.cache/igrpo-nemo/nemo-rl-0.7.0
NEMO_SKILLS_SRC ?= $(HOME)/.cache/igrpo-nemo/nemo-skills

.PHONY: help install install-nemo install-bench install-skills install-nemo-where-found demo evaluate compare test test-hosts test-nemo test-skills test-slurm lint clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## create .venv and install igrpo-nemo with its test tools

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "igrpo-nemo needs Python 3.11 or newer; set PYTHON=python3.X")'
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

install-nemo: install ## what NeMo-RL's driver imports (NeMo-RL itself: see docs)
	$(BIN)/pip install --quiet --editable '.[dev,nemo]'

install-bench: install ## TRL, for the benchmarks that compare with it
	$(BIN)/pip install --quiet --editable '.[dev,bench]'

install-skills: install ## an environment for NeMo-Skills, from its source (NEMO_SKILLS_SRC; see docs/evaluation.md)
	NEMO_SKILLS_SRC="$(NEMO_SKILLS_SRC)" $(BIN)/python tests/skills/skills_environment.py

demo: install ## train a small model with iGRPO on this machine (about 3 minutes)
	$(BIN)/igrpo train experiment=demo
	$(BIN)/igrpo report runs/demo

evaluate: install ## the demo's model through NeMo-Skills' ns eval (see docs/evaluation.md)
	$(BIN)/python pipelines/evaluate.py --demo

compare: install ## GRPO, iGRPO and the controls at one budget, three seeds each
	$(BIN)/python benchmarks/compare.py

test: install ## unit, engine and end-to-end tests
	$(BIN)/pytest -n $(PROCESSES) --dist worksteal tests/unit tests/local tests/e2e

test-hosts: test-nemo test-skills test-slurm ## what igrpo-nemo is hosted by: NeMo-RL, NeMo-Skills, Slurm

install-nemo-where-found: install
	@if [ -d "$(NEMO_RL_SRC)/nemo_rl" ]; then $(BIN)/pip install --quiet --editable '.[dev,nemo]'; fi

test-nemo: install-nemo-where-found ## tests against NeMo-RL, for whoever has its source (NEMO_RL_SRC; see docs/install.md)
	NEMO_RL_SRC="$(NEMO_RL_SRC)" $(BIN)/pytest tests/nemo

test-skills: install ## tests against NeMo-Skills, for whoever has its source (NEMO_SKILLS_SRC)
	NEMO_SKILLS_SRC="$(NEMO_SKILLS_SRC)" $(BIN)/pytest -n $(PROCESSES) --dist worksteal tests/skills

test-slurm: install ## tests on a virtual Slurm cluster, where this machine can hold one (Debian, root)
	NEMO_RL_SRC="$(NEMO_RL_SRC)" $(BIN)/pytest tests/slurm

lint: install ## style, formatting, types, and which way imports go
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

clean: ## remove what the targets above made, except .venv
	rm -rf runs .pytest_cache .ruff_cache
