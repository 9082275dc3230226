# Every target but clean sets up .venv first; that needs Python >= 3.12 and PyPI.

# Tried in this order. python3 comes first so that a version manager's .python-version has its say.
PYTHONS := python3 python3.14 python3.13 python3.12
BIN := .venv/bin
SEED := 0
GPU_PYTHON := python3

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow gpu-test lint types wheel-check docs commands colabs release clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

demo: .venv/.stamp ## Train and reinforce a tiny M1 into runs/demo-SEED (make demo SEED=1)
	$(BIN)/python -m train.demo --workdir=runs/demo-$(SEED) --seed=$(SEED)

test: .venv/.stamp ## Run the tests (CPU)
	$(BIN)/python -m pytest -n 2 --dist loadscope -m "not slow and not commands and not colabs" tests

test-slow: .venv/.stamp ## Compile for TPUs ahead; kill and resume jobs, several processes
	$(BIN)/python -m pytest -n 2 --dist loadscope -m slow tests

# With the machine's own Python, which has a JAX for its GPU; pytest-xdist shares the compiling.
gpu-test: ## Run the kernels' tests on a Hopper GPU (make gpu-test GPU_PYTHON=python3)
	XLA_PYTHON_CLIENT_PREALLOCATE=false $(GPU_PYTHON) -m pytest -p no:benchmark -n 8 tests/gpu

lint: .venv/.stamp ## Check style and formatting with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.stamp ## Check types with mypy
	$(BIN)/mypy

wheel-check: .venv/.stamp ## Build the wheel, install it apart and use it outside the checkout
	$(BIN)/python -m pytest tests/test_packaging.py -k wheel

docs: .venv/.docs ## Build the docs site into site/, without a warning or a dead link
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

commands: .venv/.docs ## Run every command of README.md and docs/ as it is printed
	$(BIN)/python -m pytest -n 2 --dist load --maxschedchunk 1 -m commands tests/docs

# Small and compiled in a hurry: what they claim is checked, not how fast it is.
colabs: .venv/.docs ## Run the Colabs at their small setting, and compare them with their notebooks
	$(BIN)/python -m pytest -m colabs tests/docs

release: .venv/.stamp ## Build and try a release; TAG=1 tags it (make release VERSION=0.1.0)
	scripts/release.sh "$(VERSION)" $(if $(TAG),--tag)

clean: ## Remove .venv, build output and caches (runs/ stays)
	rm -rf .venv build dist site .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ensurepip is asked for too, because some systems ship Python without what `-m venv` needs.
.venv/.stamp: pyproject.toml constraints.txt
	@for python in $(PYTHONS); do \
	  if "$$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then \
	    echo "setting up .venv with $$python ($$("$$python" -V))"; \
	    exec "$$python" -m venv .venv; \
	  fi; \
	done; \
	echo "No Python >= 3.12 with venv and ensurepip on PATH; looked for: $(PYTHONS)." >&2; \
	echo "Install one, or name it: make PYTHONS=/path/to/python3.12 $(MAKECMDGOALS)" >&2; \
	exit 1
	$(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check \
	  -c constraints.txt -e '.[serve,train,test,dev]'
	@# Compiles for TPUs in tests/tpu_aot. Apart, because JAX would take any process that can import
	@# it for one on a TPU; it exists for x86-64 Linux alone.
	@if [ "$$(uname -sm)" = "Linux x86_64" ]; then \
	  $(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check --no-deps \
	    -c constraints.txt --target .venv/libtpu libtpu; \
	fi
	@touch $@

.venv/.docs: .venv/.stamp
	$(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check \
	  -c constraints.txt -e '.[docs]'
	@touch $@
