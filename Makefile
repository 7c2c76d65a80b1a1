# `make` lists the targets. Needs Python 3.11 or newer with pip; everything is installed into .venv.
#
#   PYTHON=python3.12          the Python that .venv is made with
#   TORCH_INDEX=URL            where torch comes from; without it a CPU build is taken
#   TORCH_CUDA=1               take PyPI's torch, which on Linux brings CUDA
#   ARGS="-k scheduler"        more arguments for pytest or the benchmark

PYTHON ?= python3
BIN := .venv/bin
export TORCH_INDEX TORCH_CUDA

# `plugins` itself is named so that a plugin that was added or deleted is noticed.
SETUP := constraints.txt pyproject.toml scripts/install $(wildcard plugins plugins/*/pyproject.toml)

# Tests of Triton kernels under its interpreter, in a process of their own: another cannot compile them.
INTERPRETED := $(wildcard plugins/*/tests/interpreter)
# ARGS may select none of them: pytest then ends with status 5.
OR_NONE := || [ $$? -eq 5 ]

.DEFAULT_GOAL := help
.PHONY: help demo test test-full check wheels try-wheels bench gpu-wheels bench-gpu loc FORCE

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: .venv/installed ## answer a few chat prompts with the demo model
	$(BIN)/python examples/demo.py

test: .venv/installed-test ## the whole suite, without the tests marked `full`
	$(BIN)/python -m octavo.demo_model
	$(BIN)/python -m pytest $(ARGS)
	$(if $(INTERPRETED),TRITON_INTERPRET=1 $(BIN)/python -m pytest $(INTERPRETED) $(ARGS) $(OR_NONE))

test-full: .venv/installed-test ## the whole suite, the long tests included
	$(BIN)/python -m octavo.demo_model
	$(BIN)/python -m pytest -m "" $(ARGS)
	$(if $(INTERPRETED),TRITON_INTERPRET=1 $(BIN)/python -m pytest -m "" $(INTERPRETED) $(ARGS) $(OR_NONE))

check: .venv/installed-test ## ruff's rules and format, mypy --strict
	scripts/check

wheels: .venv/installed ## build wheels of the core and of each plugin into dist/
	rm -f dist/*.whl
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist \
		. $(patsubst %/pyproject.toml,./%,$(wildcard plugins/*/pyproject.toml))

try-wheels: wheels ## install wheels into a fresh environment elsewhere and run the quickstart there
	$(BIN)/python scripts/try_wheels

bench: .venv/installed-test ## measure this machine's CPU
	$(BIN)/python benchmarks/cpu.py $(ARGS)

gpu-wheels: .venv/installed-test ## fetch what Octavo needs on a GPU machine without network into build/gpu-wheels
	$(BIN)/python scripts/gpu_wheels $(ARGS)

bench-gpu: ## measure this machine's GPU with the Python that has torch, Octavo not being installed: PYTHON=python3
	$(PYTHON) benchmarks/gpu.py $(ARGS)

loc: ## lines of Python in each package
	@$(PYTHON) scripts/loc

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"Octavo needs Python 3.11 or newer; $(PYTHON) is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv || { $(PYTHON) -m venv --clear --without-pip .venv \
		&& $(PYTHON) -m pip --python .venv/bin/python install pip; }

.venv/installed: $(SETUP) | .venv/bin/python
	$(BIN)/python scripts/install
	touch $@

.venv/installed-test: $(SETUP) | .venv/bin/python
	$(BIN)/python scripts/install --test
	touch .venv/installed $@

# A torch that is asked for by name is looked at again even when everything is installed.
ifneq ($(TORCH_INDEX)$(TORCH_CUDA),)
.venv/installed .venv/installed-test: FORCE
endif
