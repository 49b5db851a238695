# `make demo` and `make test` work on a fresh machine with Python, a C++ compiler and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

KERNELS := CMakeLists.txt $(shell find kernels -type f -not -name '*.py')
SOURCES := pyproject.toml constraints.txt $(KERNELS)

.PHONY: demo test test-lowest lint ctest sanitize fuzz bench clean

demo: $(VENV)/.train
	$(BIN)/amtss-fast demo

# Processes, each on one thread: most of the time goes into Triton's interpreter, which knows no second one.
JOBS ?= 2
test: $(VENV)/.test lint ctest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# The same with the oldest versions that pyproject.toml allows. 8-bit teachers need a newer transformers: their tests are
# skipped by name. A Python for which these versions have wheels: 3.10 or 3.11.
LOWEST := .venv-lowest
test-lowest: $(LOWEST)/.test
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n $(JOBS) --dist worksteal --ignore tests/benchmarks --ignore tests/loss

# The C++ core by itself, on every instruction set of this machine.
CORE := -DAMTSS_PYTHON=OFF -DAMTSS_TESTS=ON
ctest: $(VENV)/.test
	$(BIN)/cmake -S . -B build/ctest $(CORE) > build/ctest.log
	$(BIN)/cmake --build build/ctest --parallel 2 >> build/ctest.log
	$(BIN)/ctest --test-dir build/ctest --output-on-failure

# The same with sanitizers, and random cases of the loss. On two cores a million takes half an hour; ThreadSanitizer, which
# gets larger cases on several threads, takes ten minutes for 2000.
FUZZ_address,undefined ?= 1000000
FUZZ_thread ?= 2000
sanitize: $(VENV)/.test sanitize-address,undefined sanitize-thread

sanitize-%:
	$(BIN)/cmake -S . -B build/$* $(CORE) -DAMTSS_SANITIZE=$*
	$(BIN)/cmake --build build/$* --parallel 2
	AMTSS_FUZZ_CASES=$(FUZZ_$*) $(BIN)/ctest --test-dir build/$* --output-on-failure --verbose --tests-regex fuzz
	$(BIN)/ctest --test-dir build/$* --output-on-failure --exclude-regex fuzz

# Random calls and files, AMTSS_FUZZ_EXAMPLES (20000) of each test; ends with a table of what was tried and what came of it.
fuzz: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --hypothesis-profile fuzz \
		$$(find tests -name 'test_fuzz_*.py')

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The committed figures, of a named machine, stay: RESULTS=benchmarks/results replaces them.
RESULTS ?= runs/bench
bench: $(VENV)/.test
	$(BIN)/python benchmarks/bench_loss.py --results $(RESULTS)

clean:
	rm -rf $(VENV) $(LOWEST) build

# A stamp per extra: the second call installs nothing, and a change of the sources rebuilds the extension.
$(VENV)/.train: $(SOURCES) | $(BIN)/python
	$(PIP) install -c constraints.txt -e ".[train]"
	touch $@

$(VENV)/.test: $(SOURCES) | $(BIN)/python
	$(PIP) install -c constraints.txt -e ".[train,test,bench]"
	touch $@ $(VENV)/.train

# A build folder of its own: the two environments do not rebuild each other's extension.
$(LOWEST)/.test: pyproject.toml constraints-lowest.txt $(KERNELS)
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip --disable-pip-version-check -q install -c constraints-lowest.txt \
		-C build-dir=build/lowest -e ".[train]" hypothesis pytest pytest-xdist triton
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
