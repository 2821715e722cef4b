PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*/*.h csrc/*/*/*.cpp)

.PHONY: demo test install bench wheel lint format sanitize sanitize-address sanitize-undefined sanitize-thread emulate-cuda clean

# Two small models trained from nothing, in a few minutes; checkpoints and a picture go to demo-out/.
demo: install
	$(BIN)/python examples/demo.py

test: install
	$(BIN)/python -m pytest -q

# Not isolated, so that rebuilding is incremental and the pins of constraints.txt hold for the build too.
install: .venv/ready
	$(PIP) install -q --no-build-isolation --no-deps -e .

.venv/ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt scikit-build-core pybind11 cmake ninja \
	  torch==$$(sed -n 's/^torch==//p' constraints.txt) numpy safetensors tokenizers typer rich \
	  pytest hypothesis matplotlib gguf jinja2 protobuf sentencepiece transformers
	touch $@

# Every operation against torch and the machine's ceilings: a table, build/bench.csv and build/bench.png.
bench: install
	mkdir -p build
	$(BIN)/pyllm bench --csv build/bench.csv --picture build/bench.png

# The sdist, and the wheel from it as users' pip builds it: isolated, and without CUDA.
wheel: .venv/ready
	rm -rf dist
	$(BIN)/python -c 'from scikit_build_core.build import build_sdist; build_sdist("dist")'
	$(PIP) wheel -q --no-deps -C cmake.define.PYLLM_CUDA=OFF -w dist dist/*.tar.gz

lint: .venv/ready
	$(PIP) install -q -c constraints.txt ruff mypy clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: .venv/ready
	$(PIP) install -q -c constraints.txt ruff clang-format
	$(BIN)/ruff check -q --fix . ; $(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# The operations' tests under a sanitizer, and those of the one thing that compiled code does with data from files: all
# readers are in Python, but quantised weights are packed. Python itself is not instrumented: its leaks are its own, and
# the address and thread run-times must be loaded before it, with the C++ library whose exceptions they watch. `-S` leaves
# out the editable install, so that build/SANITIZER is what runs; our own pool runs too, since OpenMP's library hides its
# synchronisation from the thread sanitizer.
sanitize: sanitize-address sanitize-undefined

preload = LD_PRELOAD="$$(c++ -print-file-name=$(1)) $$(c++ -print-file-name=libstdc++.so.6)"
sanitize-address: RUNTIME = $(call preload,libasan.so)
sanitize-undefined: RUNTIME =
sanitize-thread: RUNTIME = $(call preload,libtsan.so) PYLLM_POOL=own
sanitize-address sanitize-undefined sanitize-thread: sanitize-%: .venv/ready
	$(PIP) install -q --no-build-isolation --no-deps --upgrade --target build/$*/site -C build-dir=build/$* \
	  -C cmake.define.PYLLM_SANITIZE=$* -C cmake.define.PYLLM_CUDA=OFF -C install.strip=false .
	PYTHONPATH=$(CURDIR)/build/$*/site:$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))') \
	  ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  TSAN_OPTIONS=halt_on_error=1:suppressions=tests/thread_sanitizer.txt \
	  $(RUNTIME) $(BIN)/python -S $(BIN)/pytest -q -p no:cacheprovider --capture=sys \
	  tests/ops tests/checkpoint/test_malformed_quantized.py

# The CUDA kernels on the CPU, each thread of a block in turn, under their own tests.
emulate-cuda: .venv/ready
	$(PIP) install -q --no-build-isolation --no-deps --upgrade --target build/emulated/site -C build-dir=build/emulated \
	  -C cmake.define.PYLLM_EMULATE_CUDA=ON -C cmake.define.PYLLM_ISAS=baseline .
	PYTHONPATH=$(CURDIR)/build/emulated/site:$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))') \
	  $(BIN)/python -S $(BIN)/pytest -q -p no:cacheprovider tests/cuda

clean:
	rm -rf .venv build dist
