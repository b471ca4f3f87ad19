# Everything happens inside .venv; `make install` makes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Modules are compiled once: tests start many processes.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install demo test soak lint check format proto clean

help:
	@echo "make install   make .venv with everything"
	@echo "make demo      the whole loop on scikit-learn's digits, into demo-out/"
	@echo "make lint      format, lint and types"
	@echo "make check     format, lint, types and fast tests"
	@echo "make test      all tests but those of make soak"
	@echo "make soak      further cases of what others show"
	@echo "make proto     generate fedge.wire.v1 from its .proto files"

install: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@# torch first, so that TORCH_INDEX="--index-url URL" can choose a build (CPU only, or another CUDA).
	$(BIN)/python -m pip install --quiet "torch>=2.13,<2.14" $(TORCH_INDEX)
	$(BIN)/python -m pip install --quiet --editable ".[all]"
	touch $(STAMP)

demo: install
	$(BIN)/fedge-sim demo --out demo-out --overwrite

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint
	$(BIN)/pytest -q -n 2 -m "not slow"

test: install
	@# A third of them, by time, waits for processes: three at once keep two cores busy.
	$(BIN)/pytest -q -n 3 --dist worksteal -m "not soak" --hypothesis-profile thorough --durations 25

# Further cases of what others show.
soak: install
	$(BIN)/pytest -q -m soak

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Generated code is committed; a test holds it to the .proto files.
proto: install
	$(BIN)/python -m grpc_tools.protoc -I common --python_out=common --pyi_out=common --grpc_python_out=common \
		common/fedge/wire/v1/*.proto

clean:
	rm -rf $(VENV) demo-out build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
