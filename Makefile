# Everything below runs in .venv, which is made on first use: Python 3.11 and pip are all it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
HUB_1X := $(VENV)-hub-1x
BENCH := $(VENV)-bench
INTEROP := $(VENV)-interop
BROWSER := tests/browser/node_modules
OLDEST := $(VENV)-oldest
# All but those that need packages of other groups, or take long and depend on no version. Old packages warn of newer ones.
OLDEST_TESTS ?= tests/codecs tests/format tests/files tests/tensors tests/ops tests/conformance tests/live tests/train tests/report

.PHONY: demo docs dist test browser-test test-hub-1x test-oldest test-deep test-fused compatibility sanitize fuzz lint format bench bench-quick gpu-rehearse interop vectors clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/python -m pytest -n auto

# The documentation site, in build/site. Broken links and missing docstrings are errors.
docs: $(READY)
	$(BIN)/python docs/site/build.py

# Wheel and sdist in dist/: built twice and equal byte for byte, then installed in clean environments: of PYTHONS, or of each
# Python from 3.11 that is found.
dist: $(READY)
	$(BIN)/python tests/check_dist.py $(addprefix --python ,$(PYTHONS))

# The page of inspect --html and the viewer of docs/viewer in a headless Chromium, with axe. npm installs the browser (Linux, x64);
# elsewhere, CHROME=/path/to/chrome names an installed one.
browser-test: $(READY) $(BROWSER)/.ready
	$(BIN)/python -m pytest -n0 tests/browser

# The Hub's tests with the last huggingface_hub before 2, which transformers still asks for.
test-hub-1x: $(HUB_1X)/.ready
	$(HUB_1X)/bin/python -m pytest -n auto tests/hub

# The lowest version of each package that pyproject.toml accepts; docs/compatibility.md says what is tested with what.
test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -n auto -W default --ignore tests/train/test_gpu_benchmark.py $(OLDEST_TESTS)

# Property tests with 20 times the examples, other ones in every run; those that fail are kept in .hypothesis.
test-deep: $(READY)
	$(BIN)/python -m pytest -n auto --deep tests/property tests/tensors tests/conformance tests/live/test_strides.py \
		tests/hub/test_parts.py tests/train/test_selection.py

# The kernels for GPUs on a CPU: by Triton's interpreter, and compiled for two generations of GPUs. Triton takes 1 GB.
test-fused: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt --group fused
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n0 tests/live/test_fused.py

# Which optimizers and trainers SIFT works with; writes the tables of docs/compatibility.md.
compatibility: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt --group compatibility
	$(BIN)/python benchmarks/compatibility.py --result docs/compatibility.md

# The compiled kernels with checks of every memory access and of undefined behaviour, on damaged streams; Linux with gcc.
SANITIZED := build/sanitized
STREAMS ?= 200000
CHECKED = LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	PYTHONMALLOC=malloc PYTHONPATH=$(SANITIZED)/lib SPARSEDELTA_KERNELS=compiled $(BIN)/python
sanitize: $(READY)
	rm -rf $(SANITIZED)
	CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -DNO_CLONES" \
		$(BIN)/python setup.py --quiet build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	$(CHECKED) tests/fuzz_kernels.py --streams $(STREAMS)
	$(CHECKED) -P -m pytest -n0 tests/codecs tests/tensors/test_small.py tests/tensors/test_small_tables.py \
		tests/format/test_header_columns.py

# Mutated deltas through every operation, guided by coverage, in one process for each core; those that find something are kept
# in build/mutants. Linux.
FUZZ_SECONDS ?= 600
fuzz: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt --group fuzz
	$(BIN)/python benchmarks/mutations.py --guided --processes $$(nproc) --seconds $(FUZZ_SECONDS) --seed $$(date +%s) \
		--kept build/mutants --result build/mutations.md

lint: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# sparsedelta beside other tools, on changes that training makes; hours in full, `BENCH_OPTIONS=--quick` for minutes.
bench: $(BENCH)/.ready
	$(BENCH)/bin/python benchmarks/against.py $(BENCH_OPTIONS)
	$(BENCH)/bin/python benchmarks/plots.py

# Codecs and whole commands beside the limits of this machine, and beside the recorded figures; three minutes.
bench-quick: $(READY)
	$(BIN)/python benchmarks/kernels.py --gb 0.1 --rounds 3 --parts codings commands --result .demo/bench-quick.md

# What benchmarks/gpu.py does on a GPU, at toy size on a CPU; `make test` runs it as well.
gpu-rehearse: $(READY)
	$(BIN)/python benchmarks/gpu.py --rehearse

# The forms of other projects, with the code of these projects; SOURCES is the folder that docs/interop.md describes.
interop: $(INTEROP)/.ready
	$(INTEROP)/bin/python benchmarks/foreign_forms.py $(if $(SOURCES),--sources $(SOURCES))

vectors: $(READY)
	$(BIN)/python spec/make_vectors.py

# Changes of these files need a new installation: settings, and the source of the compiled kernels.
INSTALLED := pyproject.toml setup.py $(wildcard sparsedelta/codecs/kernels/*.[ch])

$(READY): $(INSTALLED) constraints.txt
	@echo "Installing torch and everything else that make needs into $(VENV); this takes a few minutes, once."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[channel,hub,train]" --group demo --group recipes --group dev
	touch $@

$(BROWSER)/.ready: tests/browser/package.json tests/browser/package-lock.json
	cd tests/browser && npm ci --no-audit --no-fund --silent
	touch $@

$(HUB_1X)/.ready: $(INSTALLED)
	$(PYTHON) -m venv $(HUB_1X)
	$(HUB_1X)/bin/python -m pip install --quiet -e . "huggingface_hub>=1.30,<2" pytest pytest-xdist hypothesis
	touch $@

$(OLDEST)/.ready: $(INSTALLED)
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet uv
	$(OLDEST)/bin/uv pip install --python $(OLDEST)/bin/python --resolution lowest-direct \
		-e ".[channel,hub,interop,pictures,train]" "pytest>=8.0" "pytest-xdist>=3.6" "hypothesis>=6.100"
	touch $@

$(BENCH)/.ready: $(INSTALLED) constraints.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BENCH)/bin/python -m pip install --quiet -c constraints.txt -e ".[train]" --group demo --group bench
	touch $@

$(INTEROP)/.ready: $(INSTALLED) constraints.txt
	$(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(INTEROP)/bin/python -m pip install --quiet -c constraints.txt -e ".[interop,train]" --group interop
	touch $@

clean:
	rm -rf $(VENV) $(HUB_1X) $(BENCH) $(INTEROP) $(OLDEST) $(BROWSER) .demo build dist sparsedelta/codecs/kernels/*.so
