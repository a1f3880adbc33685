# make demo and make test work on a fresh machine: each sets up .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
# Let OpenMP threads that wait for each other sleep soon, not spin: on a machine that does other work besides, spinning
# makes training on the CPU several times slower.
export GOMP_SPINCOUNT ?= 10000

.PHONY: demo test lint format bench clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: .venv/installed
	$(BIN)/python prepare_data.py python-docs --output_dir data/python-docs
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml train_accelerate.py --config recipes/demo.yaml

test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/installed
	$(BIN)/python benchmarks/train_step.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
