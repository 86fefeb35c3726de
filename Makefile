# Everything sets itself up in .venv; a second run starts at once.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: quickstart quickstart-4bit benchmark-smoke test lint

quickstart: .venv/recipes.ready ## a real model on real reviews; SENTENCES='"one" "two"' to classify your own
	$(BIN)/python recipes/quickstart.py $(SENTENCES)

quickstart-4bit: .venv/recipes.ready .venv/quantization.ready ## the same prompt over a full-precision and a 4-bit backbone
	$(BIN)/python -m benchmarks backbones --output outputs/quickstart-4bit/backbones.jsonl

benchmark-smoke: .venv/benchmarks.ready ## every method for a moment, and the report of it
	$(BIN)/python -m benchmarks run benchmarks/suites/smoke.yaml --report outputs/benchmarks/smoke

test: .venv/dev.ready ## the tests: CPU only, no Hub
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

lint: .venv/dev.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch alone and first: with it in place no other package asks for a CUDA build
.venv/%.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e '.[$*]'
	touch $@
