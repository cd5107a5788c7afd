# Two commands do all the set-up: `make demo` runs the main job, `make test` passes the tests.
#
#   PYTHON    interpreter that makes the virtual environment
#   PIP_ARGS  passed to pip, for instance to take torch from a CPU-only index:
#             make demo PIP_ARGS="--extra-index-url URL-OF-A-TORCH-INDEX"

PYTHON   ?= python3
PIP_ARGS ?=
VENV     := .venv
BIN      := $(VENV)/bin

.PHONY: demo test test-all mutate pipelines operations bench lint types docs wheel clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py out/demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile -m "not slow"

# The slow tests too: every combination where make test takes pairs, many steps and rounds, models of
# real size; with the real libraries that stand beside a fusion, whose tests make test skips where they
# are not installed.
test-all: $(VENV)/.companions
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# Twenty thousand random changes of valid LoRA files, of artifacts of every kind, of the files of
# statistics, and of the other files that klora reads; make test tries a few hundred.
mutate: $(VENV)/.dev
	KLORA_MUTATIONS=20000 $(BIN)/python -m pytest tests/reading/test_mutated_loras.py \
		tests/reading/test_mutated_files.py tests/artifact/test_mutated_artifacts.py \
		tests/profiles/test_mutated_statistics.py

# A thousand rounds of random operations on a pipeline; make test does one. Hours.
operations: $(VENV)/.dev
	KLORA_OPERATIONS=1000 $(BIN)/python -m pytest tests/pipeline/test_random_operations.py

# The table of all pipeline classes of the installed diffusers, half an hour; what changed is printed.
# Some alone: make pipelines CLASSES="FluxPipeline WanPipeline".
pipelines: $(VENV)/.dev
	PYTHONPATH=examples:tests $(BIN)/python -m support.sweep $(CLASSES)

# The documentation, as pages in out/site. Every warning is an error.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# What the documents print of speed and size: an hour. One part alone: make bench-race, bench-attach,
# bench-measuring, bench-reading, bench-size, bench-swapping, bench-sweeping, bench-catalogue, bench-before; with
# options of its own: make bench-race ARGS="--device cuda", make bench-before ARGS=COMMIT.
PARTS := $(addprefix bench-,race attach measuring reading size swapping sweeping catalogue before)
.PHONY: $(PARTS)

bench: $(PARTS)

$(PARTS): bench-%: $(VENV)/.bench
	PYTHONPATH=examples:tests $(BIN)/python -m benchmark $(if $(ARGS),$* $(ARGS),published $*)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

# Wheels and source distributions of both, without a network once .venv is there.
wheel: $(VENV)/.dev
	rm -rf dist
	cd runtime && ../$(BIN)/python -m hatchling build -d ../dist
	$(BIN)/python -m hatchling build -d dist
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf $(VENV) out dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A stamp per extra: installed again when the requirements change.
$(VENV)/.%: pyproject.toml runtime/pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt \
		--editable ./runtime --editable '.[$*]'
	touch $@
