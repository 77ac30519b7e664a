# make           the virtual environment, if anything in it has changed
# make test      lint, types, layers, and the tests; brings up a real SLURM (see slurm/dev-cluster.sh)
# make demo      a tiny run that is killed and goes on
# make test-k8s  the Kubernetes tests that need a real cluster
# make soak      the tests that repeat for long, and variants of others: what CI runs at night
# make lint      without the tests
# make docs      the site, into site/

PYTHON ?= python3
PYTEST_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
SLURM_LOG := .slurm-tests.log
INSTALLED := $(VENV)/.installed

.PHONY: venv demo test test-k8s soak lint docs

venv: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'make venv: $(PYTHON) is missing or older than 3.11; name another: make PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo 'make venv: $(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train,data,eval,s3,k8s,sweep,serve,ui,torchx,dev,docs]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python -m llmops.demo

# Three streams at the same time: one waits for SLURM most of its time. With PYTEST_ARGS, what these say.
test: lint
ifeq ($(PYTEST_ARGS),)
	@echo 'tests that wait for SLURM: written to $(SLURM_LOG), and shown at the end'
	@$(BIN)/pytest -m '(slurm or signals) and not (soak or long)' >$(SLURM_LOG) 2>&1 & slurm=$$!; \
	  $(BIN)/pytest -n 2 --dist worksteal -m 'not (slurm or signals or soak or long or k8s_cluster)'; others=$$?; \
	  wait $$slurm; code=$$?; cat $(SLURM_LOG); exit $$((others | code))
else
	$(BIN)/pytest $(PYTEST_ARGS)
endif

# Against the cluster of the current kubeconfig, in a namespace of its own; see tests/k8s/cluster.
test-k8s: $(INSTALLED)
	$(BIN)/pytest -m k8s_cluster tests/k8s/cluster $(PYTEST_ARGS)

soak: $(INSTALLED)
	$(BIN)/pytest -m 'soak or long' $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@# The supervisor runs on whatever Python a node has, from 3.9 on.
	$(BIN)/ruff check --isolated --target-version py39 --select E9,F,FA102 llmops/agent

docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict
