PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check

.PHONY: test install lint clean

test: install
	$(BIN)/python -m pytest -q

# Not isolated, so that rebuilding is incremental and the pins of constraints.txt hold for the build too.
install: .venv/ready
	$(PIP) install -q --no-build-isolation --no-deps -e .

.venv/ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt scikit-build-core pybind11 cmake ninja \
	  torch==$$(sed -n 's/^torch==//p' constraints.txt) numpy safetensors tokenizers typer rich \
	  pytest hypothesis matplotlib
	touch $@

lint: .venv/ready
	$(PIP) install -q -c constraints.txt ruff mypy clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv build dist
