# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A busy neighbour must not make worker threads spin.
export OMP_WAIT_POLICY ?= PASSIVE
# Tests that run at a time.
PROCESSES ?= 2
NEMO_RL_SRC ?= $(HOME)/.cache/igrpo-nemo/nemo-rl-0.7.0
NEMO_RL_MAIN_SRC ?= $(HOME)/.cache/igrpo-nemo/nemo-rl-main
NEMO_SKILLS_SRC ?= $(HOME)/.cache/igrpo-nemo/nemo-skills
# Where NeMo-RL's source is, what its driver imports is installed at once.
COMMA := ,
EXTRAS := dev,docs$(if $(wildcard $(NEMO_RL_SRC)/nemo_rl),$(COMMA)nemo)
# Modules are compiled when they are imported, and kept: most never are, and the tests start many
# processes.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := $(BIN)/pip install --quiet --no-compile

.PHONY: help install install-nemo install-bench install-skills demo evaluate compare docs test test-hosts test-nemo test-nemo-main test-skills test-slurm lint clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## create .venv and install igrpo-nemo with its test tools

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "igrpo-nemo needs Python 3.11 or newer; set PYTHON=python3.X")'
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	-$(PIP_INSTALL) --upgrade pip # Python's own may be years old, and takes four times as long
	$(PIP_INSTALL) --editable '.[$(EXTRAS)]'
	@touch $@

install-nemo: install ## what NeMo-RL's driver imports (NeMo-RL itself: see docs)
	$(PIP_INSTALL) --editable '.[dev,nemo]'

install-bench: install ## TRL, for the benchmarks that compare with it
	$(PIP_INSTALL) --editable '.[dev,bench]'

install-skills: install ## an environment for NeMo-Skills, from its source (NEMO_SKILLS_SRC; see docs/evaluation.md)
	NEMO_SKILLS_SRC="$(NEMO_SKILLS_SRC)" $(BIN)/python tests/skills/skills_environment.py

demo: install ## train a small model with iGRPO on this machine (about 4 minutes)
	$(BIN)/igrpo train experiment=demo
	$(BIN)/igrpo report runs/demo

evaluate: install ## the demo's model through NeMo-Skills' ns eval (see docs/evaluation.md)
	$(BIN)/python pipelines/train_and_evaluate.py experiment=demo --evaluator nemo_skills

compare: install ## GRPO, iGRPO, its controls and the two baselines at one budget, three seeds each
	$(BIN)/igrpo study compare

docs: install ## the docs as a site, in build/docs/VERSION; a broken link ends it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir \
	  build/docs/$$($(BIN)/python -c 'import igrpo_nemo; print(igrpo_nemo.__version__)')

test: install ## unit, engine and end-to-end tests
	$(BIN)/pytest -n $(PROCESSES) --dist worksteal tests/unit tests/local tests/gpu tests/e2e

test-hosts: test-nemo test-nemo-main test-skills test-slurm ## what igrpo-nemo is hosted by: NeMo-RL, NeMo-Skills, Slurm

test-nemo: install ## tests against NeMo-RL, for whoever has its source (NEMO_RL_SRC; see docs/install.md)
	@test ! -d "$(NEMO_RL_SRC)/nemo_rl" || $(BIN)/python -c 'import tensordict' 2>/dev/null || $(MAKE) install-nemo
	NEMO_RL_SRC="$(NEMO_RL_SRC)" $(BIN)/pytest tests/nemo

# CI runs the guard alone (MAIN_TESTS): all of them take half as long as test-nemo.
MAIN_TESTS ?= tests/nemo
test-nemo-main: install ## what of them must pass on NeMo-RL's main too (NEMO_RL_MAIN_SRC)
	NEMO_RL_SRC="$(NEMO_RL_MAIN_SRC)" $(BIN)/pytest -m either_tree $(MAIN_TESTS)

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
