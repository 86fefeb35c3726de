# Everything sets itself up in $(VENV); a second run starts at once.
PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: quickstart quickstart-4bit benchmark-smoke test test-oldest test-newest lint release

quickstart: $(VENV)/recipes.ready ## a real model on real reviews; SENTENCES='"one" "two"' to classify your own
	$(BIN)/python recipes/quickstart.py $(SENTENCES)

quickstart-4bit: $(VENV)/benchmarks.ready ## the same prompt over a base model in full precision and in 4 bits, and a report
	$(BIN)/python -m benchmarks run benchmarks/suites/quickstart_4bit.yaml
	$(BIN)/python -m benchmarks report --results outputs/benchmarks/quickstart_4bit.jsonl --output outputs/quickstart-4bit

benchmark-smoke: $(VENV)/benchmarks.ready ## every method for a moment, and the report of it
	$(BIN)/python -m benchmarks run benchmarks/suites/smoke.yaml
	$(BIN)/python -m benchmarks report --results outputs/benchmarks/smoke.jsonl --output outputs/benchmarks/smoke

test: $(VENV)/dev.ready ## the tests: CPU only, no Hub
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(TESTS)

# what depends on other libraries; tasks, reports and grids of runs do not
BOTH := tests/export tests/inits tests/peft_models tests/shared_prefix tests/benchmarks/test_gpu.py tests/benchmarks/test_speed.py
BOTH += $(patsubst %,tests/test_%.py,config encoder memory prompt_record quantization real_backbone seam trainer trl versions)
BOTH += tests/recipes/test_existing_script.py tests/test_devices.py

test-oldest test-newest: test-%: ## the package's tests on the first and on the last versions, in .venv-oldest, .venv-newest
	$(MAKE) test VENV=.venv-$* CONSTRAINTS=constraints-$*.txt TESTS='$(BOTH)'

lint: $(VENV)/dev.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

release: $(VENV)/release.ready ## the wheel and the source package: built, checked and uploaded to the package index
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/twine upload dist/*

# torch alone and first: with it in place no other package asks for a CUDA build
$(VENV)/%.ready: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c $(CONSTRAINTS) torch
	$(PIP) install -q -c $(CONSTRAINTS) -e '.[$*]'
	touch $@
