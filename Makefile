# `make demo` and `make test` work on a fresh machine with Python, a C++ compiler and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(shell find kernels -type f -not -name '*.py')

.PHONY: demo test lint ctest sanitize bench clean

demo: $(VENV)/.train
	$(BIN)/amtss-fast demo

# Processes, each on one thread: most of the time goes into Triton's interpreter, which knows no second one.
JOBS ?= 2
test: $(VENV)/.test lint ctest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# The C++ core by itself, on every instruction set of this machine.
CORE := -DAMTSS_PYTHON=OFF -DAMTSS_TESTS=ON
ctest: $(VENV)/.test
	$(BIN)/cmake -S . -B build/ctest $(CORE) > build/ctest.log
	$(BIN)/cmake --build build/ctest --parallel 2 >> build/ctest.log
	$(BIN)/ctest --test-dir build/ctest --output-on-failure

sanitize: $(VENV)/.test
	for kind in address,undefined thread; do \
		$(BIN)/cmake -S . -B build/$$kind $(CORE) -DAMTSS_SANITIZE=$$kind && \
		$(BIN)/cmake --build build/$$kind --parallel 2 && \
		$(BIN)/ctest --test-dir build/$$kind --output-on-failure || exit 1; \
	done

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The committed figures, of a named machine, stay: RESULTS=benchmarks/results replaces them.
RESULTS ?= runs/bench
bench: $(VENV)/.test
	$(BIN)/python benchmarks/bench_loss.py --results $(RESULTS)

clean:
	rm -rf $(VENV) build

# A stamp per extra: the second call installs nothing, and a change of the sources rebuilds the extension.
$(VENV)/.train: $(SOURCES) | $(BIN)/python
	$(PIP) install -c constraints.txt -e ".[train]"
	touch $@

$(VENV)/.test: $(SOURCES) | $(BIN)/python
	$(PIP) install -c constraints.txt -e ".[train,test,bench]"
	touch $@ $(VENV)/.train

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
