# Two commands: `make demo` and `make test`. Each makes .venv with what it needs, and is quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := $(shell find src -type f -not -path '*/__pycache__/*' -not -path '*.egg-info/*') pyproject.toml README.md
EWMA := $(VENV)/.ewma-$(notdir $(CC))

.PHONY: demo test format bench clean

demo: $(VENV)/.demo $(EWMA)
	$(BIN)/python examples/train_digits.py

test: $(VENV)/.dev $(EWMA)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev $(EWMA)
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch goes in alone and first: asked for together with others, pip may take a newer build with gigabytes of CUDA.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "$$(grep '^torch==' constraints.txt)"
	$(PIP) install --constraint constraints.txt setuptools
	touch $@

# The extras' packages without the project itself, so that a changed source does not ask pip to resolve them again.
$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: $(VENV)/.torch pyproject.toml
	$(PIP) install --constraint constraints.txt --no-build-isolation ".[$*]"
	touch $@

# With another compiler than last time, what the last one built must not be taken over.
$(EWMA): $(VENV)/.torch $(SOURCES)
	test -e $@ || rm -rf build $(VENV)/.ewma-*
	$(PIP) install --constraint constraints.txt --no-build-isolation --force-reinstall --no-deps .
	touch $@
