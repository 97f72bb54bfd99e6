# Everything from a bare clone:  make demo | test | slow | ahead-of-time | checks
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

.PHONY: demo test slow ahead-of-time checks clean

demo: .venv/installed
	$(BIN)/flexolmo demo --out $(OUT)

test: .venv/installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" tests

slow: .venv/installed-dev
	$(BIN)/python -m pytest -m slow tests

ahead-of-time: .venv/installed-compilers
	PYTHONPATH=.venv/compilers $(BIN)/python -m pytest -m ahead_of_time tests

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

# The compilers for TPUs and for GPUs, 2 GB of them. The latter lie apart: JAX complains at every start where it finds
# them and no GPU.
.venv/installed-compilers: .venv/installed-dev
	$(PIP) install -e '.[plan]'
	version=$$($(BIN)/python -c 'import jax; print(jax.__version__)') && $(PIP) install --upgrade --no-deps \
		--target .venv/compilers jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version 'nvidia-cudnn-cu13>=9.12,<10'
	touch $@
