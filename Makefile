# Two commands: `make demo` and `make test`. Each makes .venv with what it needs, and is quick the second time.
# For who changes the C files: `make sanitize`; for who changes the kernels in Triton: `make triton`, once, which takes a
# gigabyte, and from then on `make test` tests them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := $(shell find src -type f -not -path '*/__pycache__/*' -not -path '*.egg-info/*') pyproject.toml README.md
EWMA := $(VENV)/.ewma-$(notdir $(CC))

.PHONY: demo test triton sanitize format bench clean

demo: $(VENV)/.demo $(EWMA)
	$(BIN)/python examples/train_digits.py

test: $(VENV)/.dev $(EWMA)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

triton: $(VENV)/.triton

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The kernel tests once more, with every read, write and integer operation of the C files watched.
SANITIZED := build/sanitized
SANITIZERS := libasan.so libubsan.so libstdc++.so.6
sanitize: $(VENV)/.dev $(EWMA)
	rm -rf $(SANITIZED)
	mkdir -p $(SANITIZED)
	cp -r src/ewma $(SANITIZED)
	$(CC) -shared -fPIC -O3 -g -Wall -Wextra -Werror -Wno-unused-parameter -fsanitize=address,undefined \
		-fno-sanitize-recover=all -ffp-contract=off -fno-math-errno -fno-trapping-math -pthread \
		-I$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('include'))") \
		src/ewma/kernels/c/*.c -lm -o $(SANITIZED)/ewma/kernels/_native.abi3.so
	LD_PRELOAD="$(foreach library,$(SANITIZERS),$(shell $(CC) -print-file-name=$(library)))" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED) \
		$(BIN)/python -m pytest -k "native or compiled or passes" tests/test_native.py tests/test_compiled_scan.py \
		tests/test_passes.py tests/test_choice.py tests/test_kernels.py

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

$(VENV)/.triton: $(VENV)/.torch
	$(PIP) install --constraint constraints.txt --no-deps triton
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
