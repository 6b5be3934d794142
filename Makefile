# `make` alone prints the choices. PYTHON=python3.12 make install picks another interpreter for .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

help:
	@echo "make install     .venv in this folder, with the package and its test and demo extras"
	@echo "make demo        the whole method on real medical images; report in build/demo/    (QUICK=1: a tenth of the data)"
	@echo "make notebooks   runs the notebooks and stores what they show"
	@echo "make demo-base   trains the demo's base model anew"
	@echo "make test        every test; the C tests run under sanitizers, from pytest         (ARGS='-k name': part of pytest)"
	@echo "make test-torch  the tests of the torch adapter, in an environment with torch, transformers and trl  (STLLAVA_PEERS=PYTHON: another)"
	@echo "make test-long   the exhaustive forms: every fault, thousands of damaged files, fuzzing"
	@echo "make fuzz        every parser under a coverage-guided search                       (SECONDS=60: each so long)"
	@echo "make bench       benchmarks against torch + peft, OpenBLAS           (ARGS=sft: rows with that in their id; STLLAVA_PEERS=PYTHON: where torch is)"
	@echo "make lint        format, style, types and clang-tidy; the tools come from PyPI     (make format: formats the C files)"
	@echo "make asan        the Python tests with the core and the binding under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make tsan        the C tests under ThreadSanitizer"
	@echo "make clean       removes .venv, build/ and the built extension"

# Editable, so that what is tested is what is edited and `python -c 'import stllava_c'` in this folder finds the built extension; without build
# isolation, so that building again needs no network and compiles only what changed.
INSTALLED := $(VENV)/installed
C_FILES := $(shell find csrc stllava_c/src -name '*.[ch]' -o -name '*.cu' -o -name sources.txt)

install: $(INSTALLED)

$(INSTALLED): $(C_FILES) setup.py pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check "setuptools>=77" wheel "numpy>=2.0" scipy-openblas32
	STLLAVA_WERROR=1 $(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e ".[test,demo]"
	@touch $@

demo: install
	$(BIN)/stllava demo --out build/demo $(if $(QUICK),--quick)

notebooks: install
	$(BIN)/python notebooks/execute.py

demo-base: install
	$(BIN)/stllava demo-base

test: install
	$(BIN)/python -m pytest -q $(ARGS)

test-long: install
	$(BIN)/python -m pytest -q --long $(ARGS)
	$(MAKE) asan ARGS="$(ARGS)"

# torch and what drives it live in an environment of their own, as peers do; one that STLLAVA_PEERS names must have pytest too.
TORCH := build/torch
test-torch: install $(if $(STLLAVA_PEERS),,$(TORCH)/installed)
	PYTHONPATH=python:. $(or $(STLLAVA_PEERS),$(TORCH)/bin/python) -m pytest -q tests/torch_adapter tests/python/test_script_names.py $(ARGS)

$(TORCH)/installed: pyproject.toml
	@test -x $(TORCH)/bin/python || $(PYTHON) -m venv $(TORCH)
	$(TORCH)/bin/python -m pip install -q --disable-pip-version-check "setuptools>=77" wheel "numpy>=2.0" scipy-openblas32
	$(TORCH)/bin/python -m pip install -q --disable-pip-version-check --no-build-isolation -e ".[test-torch]"
	@touch $@

# Peers live in an environment of their own: never a dependency.
PEERS := build/peers
bench: install $(if $(STLLAVA_PEERS),,$(PEERS)/installed)
	@for file in benchmarks/bench_*.py; do $(BIN)/python $$file $(ARGS) || exit 1; done

$(PEERS)/installed: benchmarks/peers/requirements.txt
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install -q --disable-pip-version-check -r $<
	@touch $@

# The tools in the versions that pyproject.toml names, beside the package, since mypy reads NumPy's types. clang-tidy compiles as the build did.
LINT := $(VENV)/lint
FORMATTED := $(shell find csrc stllava_c/src tests/c -name '*.[ch]')

$(LINT): pyproject.toml $(INSTALLED)
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["lint"])' | \
		xargs $(BIN)/python -m pip install -q --disable-pip-version-check
	@touch $@

lint: $(LINT)
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)
	$(BIN)/ruff check .
	$(BIN)/mypy
	@find csrc stllava_c/src -name '*.c' | xargs -P $$(nproc) -n 1 $(BIN)/clang-tidy -quiet -p build

format: $(LINT)
	$(BIN)/clang-format -i $(FORMATTED)

SECONDS ?= 60
fuzz: install
	$(MAKE) -C tests/fuzz fuzz PYTHON=$(CURDIR)/$(BIN)/python SECONDS=$(SECONDS)

# An installation of its own, run from another folder: the checkout holds the extension of `make install`.
# libstdc++ comes along because AddressSanitizer looks up its throw at the start, before sentencepiece is loaded.
ASAN := $(CURDIR)/build/asan
asan:
	@test -x $(ASAN)/bin/python || $(PYTHON) -m venv $(ASAN)
	$(ASAN)/bin/python -m pip install -q --disable-pip-version-check "setuptools>=77" wheel "numpy>=2.0" scipy-openblas32
	STLLAVA_SANITIZE=1 STLLAVA_WERROR=1 STLLAVA_CUDA=0 $(ASAN)/bin/python -m pip install -q --disable-pip-version-check --no-build-isolation ".[test]"
	cd $(ASAN) && LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) libstdc++.so.6" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
		$(ASAN)/bin/pytest -q -p no:cacheprovider $(CURDIR)/tests $(ARGS)

tsan:
	$(MAKE) -s -C tests/c run SANITIZE=thread BUILD=$(CURDIR)/build/c-tests-thread

clean:
	rm -rf $(VENV) build dist python/*.egg-info stllava_c/libs stllava_c/_core*.so

.PHONY: help install demo notebooks demo-base test test-torch test-long fuzz bench lint format asan tsan clean
