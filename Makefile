# make demo    kernelize three real models with the embedded kernels; prints the report and the comparison
# make test    every test
# make lint    ruff, mypy, import-linter
# make faults  hubs that misbehave and clients that are killed, all of them (a minute or two)
# make fuzz    ten minutes of malformed input for each of four parsers
# make test-gpu   the tests that need a GPU, GPU_JOBS of them at a time, with GPU_PYTHON
# make bench   the library beside its peer, and the CPU kernels beside PyTorch, each in one run
# make bench-gpu   the CUDA kernels beside eager, torch.compile, Liger and quack, in one run on this machine's GPU, with GPU_PYTHON
# make sanitize-gpu   compute-sanitizer (memcheck, racecheck, initcheck) over the CUDA kernels of norm, activation, rotary, loss and decoder,
#              on this machine's GPU
#
# Each makes .venv and installs what it needs, but for those with a GPU. PYTHON chooses the interpreter. GPU_PYTHON is a Python with
# torch for CUDA, transformers, what kernelhub depends on (`pip install .[demo]`), and for the tests pytest, pytest-xdist and
# hatchling, for the benchmark liger-kernel==0.8.5 and quack-kernels (it says what it runs without) and, for the plot, matplotlib.

PYTHON ?= python3
GPU_PYTHON ?= $(PYTHON)
GPU_JOBS ?= 4
BIN := .venv/bin

.PHONY: demo test test-gpu lint format faults fuzz bench bench-gpu sanitize-gpu clean

demo: .venv/installed
	$(BIN)/kernelhub demo

test: .venv/installed .peers/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-gpu:
	PYTHONPATH=$(CURDIR)/src $(GPU_PYTHON) -m pytest -n $(GPU_JOBS) --dist worksteal -m gpu $$(grep -rl 'pytest\.mark\.gpu' tests --include='*.py')

lint: .venv/installed
	$(BIN)/ruff check src kernels tests benchmarks
	$(BIN)/ruff format --check src kernels tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed
	$(BIN)/ruff check --fix src kernels tests benchmarks
	$(BIN)/ruff format src kernels tests benchmarks

faults: .venv/installed
	KERNELHUB_TEST_FAULTS=all KERNELHUB_TEST_KILLS=200 $(BIN)/python -m pytest tests/hub/test_faults.py tests/hub/test_kills.py

fuzz: .venv/installed
	-$(BIN)/python -m pip install --quiet --group fuzz
	$(BIN)/python tests/fuzz/run.py

bench: .venv/installed .peers/installed
	$(BIN)/python benchmarks/library.py
	$(BIN)/python benchmarks/kernelize.py
	$(BIN)/python benchmarks/cpu_kernels.py
	$(BIN)/python benchmarks/fusion.py
	$(BIN)/python benchmarks/proof.py

bench-gpu:
	PYTHONPATH=$(CURDIR)/src $(GPU_PYTHON) benchmarks/gpu_kernels.py --json benchmarks/results/gpu.json --plot benchmarks/results/gpu.png

# The kernels are built once, and all of them seen to run, before they are watched; each tool then looks at no others.
sanitize-gpu: export PYTHONPATH := $(CURDIR)/src
sanitize-gpu: export PYTORCH_NO_CUDA_MEMORY_CACHING := 1
sanitize-gpu:
	$(GPU_PYTHON) tests/gpu/sanitize.py --cache .sanitize --covered
	for tool in memcheck racecheck initcheck; do \
	  compute-sanitizer --tool $$tool --kernel-name kns=kernelhub --error-exitcode 1 --print-limit 20 \
	    $(GPU_PYTHON) tests/gpu/sanitize.py --cache .sanitize || exit 1; \
	done

clean:
	rm -rf .sanitize .venv .peers dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch first and alone: a later release may not be taken for another package's sake
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[torch,http,s3,server,signatures,sigstore,build,demo,benchmark]' --group test --group lint
	touch $@

# The package that kernelhub is measured against and served to, in a folder of its own
.peers/installed: constraints.txt .venv/installed
	rm -rf .peers
	$(BIN)/python -m pip install --quiet --target .peers --constraint constraints.txt kernels
	touch $@
