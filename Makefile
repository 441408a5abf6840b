# Everything happens in .venv; a target does its own set-up and is quick when it is there.
# Without a GPU, take the CPU build of torch: make demo TORCH_PIP_ARGS="--index-url URL", URL from pytorch.org's install page.
PYTHON ?= python3
TORCH_PIP_ARGS ?=
BIN := $(CURDIR)/.venv/bin
export PATH := $(BIN):$(PATH)
export HF_HUB_OFFLINE := 1

.PHONY: install demo lint test test-reliability test-e2e test-gpu clean

install: .venv/.installed

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	pip install $(TORCH_PIP_ARGS) torch torchvision torchaudio
	pip install -e ".[beam,bundled,export,lora,open_clip,ray,dev]"
	touch $@

demo: install
	bash recipes/distil_whisper/run.sh quickstart

lint: install
	ruff check .
	ruff format --check .
	mypy

# a file of tests to a process, and one thread to each
test: install
	OMP_NUM_THREADS=1 pytest -n logical --maxprocesses 8 --dist loadfile -m "not e2e and not gpu and not reliability"

test-reliability: install
	pytest -m reliability tests/reliability

test-e2e: install
	pytest -m e2e

test-gpu: install
	pytest -m gpu tests/gpu

clean:                              # exp/ and data/ hold results and stay
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
