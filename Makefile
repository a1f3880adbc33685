# make demo and make test work on a fresh machine: each sets up .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
# Which releases to install: the tested ones (constraints.txt), the oldest promised (constraints-oldest.txt) or, when
# empty, the newest. Changing it updates .venv.
CONSTRAINTS ?= constraints.txt
VERSIONS := $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS),--upgrade --upgrade-strategy eager)
INSTALL := $(BIN)/pip install --quiet $(VERSIONS) --editable
INSTALLED := .venv/installed-$(or $(CONSTRAINTS),newest)
# Let OpenMP threads that wait for each other sleep soon, not spin: on a machine that does other work besides, spinning
# makes training on the CPU several times slower.
export GOMP_SPINCOUNT ?= 10000
# Tests share the cores: one process per core, one thread per process.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

.PHONY: demo test quick lint format site docs bench gpu constraints clean

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	rm -f .venv/installed*
	$(INSTALL) .
	touch $@

$(INSTALLED)-dev: $(INSTALLED)
	$(INSTALL) ".[dev]"
	touch $@

demo: $(INSTALLED)
	$(BIN)/python prepare_data.py python-docs --output_dir data/python-docs
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml train_accelerate.py --config recipes/demo.yaml

test: $(INSTALLED)-dev
	$(PYTEST)

quick: $(INSTALLED)-dev
	$(PYTEST) -m "not slow"

lint: $(INSTALLED)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

format: $(INSTALLED)-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation: built into build/site with every link checked, or served at http://127.0.0.1:8000.
site: $(INSTALLED)-dev
	$(BIN)/python scripts/build_site.py

docs: $(INSTALLED)-dev
	$(BIN)/python scripts/build_site.py --serve

bench: $(INSTALLED)
	$(BIN)/python benchmarks/train_step.py

# Where nothing can be installed: python benchmarks/gpu.py
gpu: $(INSTALLED)-dev
	$(BIN)/python benchmarks/gpu.py

# Resolves the transitive pins of constraints.txt anew, for all extras together, and keeps the direct ones. Run it with
# the oldest supported Python: what installs there also installs on later ones.
constraints:
	$(PYTHON) -m venv --clear build/constraints
	sed '/^# Transitive/,$$d' constraints.txt > build/direct.txt
	build/constraints/bin/pip install --quiet --constraint build/direct.txt --editable ".[dev,tracking,cluster]"
	build/constraints/bin/pip freeze --all --exclude pip --exclude-editable --requirement build/direct.txt \
		| sed -e 's/+cpu$$//' -e 's/^## .*/# Transitive dependencies, pinned by `make constraints`:/' > build/constraints.txt
	mv build/constraints.txt constraints.txt
	rm -r build/constraints

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
