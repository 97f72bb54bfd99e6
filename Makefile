# Everything from a bare clone:  make demo | test | slow | checks
#
# PYTHON=python3.12            another interpreter for .venv
# TORCH=torch==2.13.0          the PyTorch that the Hugging Face parity checks run with
# TORCH_INDEX=…/whl/cpu        where to look for it besides PyPI; on Linux PyPI's own build brings several GB of CUDA.
#                              Empty: PyPI only.
# OUT=runs/demo                where the demo writes

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
OUT ?= runs/demo

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
WORKERS ?= 2

.PHONY: demo test slow checks clean

demo: .venv/installed
	$(BIN)/flexolmo demo --out $(OUT)

test: .venv/installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" tests

slow: .venv/installed-dev
	$(BIN)/python -m pytest -m slow tests

checks: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m flexolmo_jax.lint_gin configs

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

# What is installed is remembered in stamp files, so that nothing is installed again until setup.py changes.

.venv/created:
	$(PYTHON) -m venv .venv
	touch $@

# PyTorch comes first and without what it needs, so that PyTorch's index is asked once, and costs seconds when out of reach.
.venv/installed-torch: .venv/created
	$(PIP) install --no-deps --retries 1 --timeout 15 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '$(TORCH)'
	touch $@

.venv/installed: .venv/installed-torch setup.py
	$(PIP) install -e '.[hf]' '$(TORCH)'
	touch $@

.venv/installed-dev: .venv/installed-torch setup.py
	$(PIP) install -e '.[hf,beam,encoder,dev]' '$(TORCH)'
	touch $@
