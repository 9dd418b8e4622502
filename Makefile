# Everything runs in .venv, which the first target that needs it makes. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint docs docs-serve test-newest test-oldest test-pinned test-readme study-small clean

demo: .venv/demo
	@$(BIN)/st-wkl demo

# One thread each: workers that all take every core wait for each other.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto
test: .venv/dev
	$(PYTEST) --dist loadfile -m 'not slow'

# What starts processes, is killed, talks to a Hub, or takes long.
test-slow: .venv/dev
	$(PYTEST) --dist loadgroup -m slow

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy st_wkl

# The site, from docs/ and the docstrings, into site/; a warning is an error (with --quiet it would be none). It asks no other server for anything.
MKDOCS = NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/python -m mkdocs
docs: .venv/docs
	$(MKDOCS) build --strict
	@echo 'The site is in site/index.html.'

docs-serve: .venv/docs
	$(MKDOCS) serve

# The wheel in a fresh environment, .venv-JOB: the newest of everything, the floors of pyproject.toml, constraints.txt;
# the README as a newcomer meets it.
# On Linux plain torch brings 3 GB of CUDA. TORCH takes another build: make test-newest TORCH=torch==2.13.0, or with
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu the CPU build of any version, such as TORCH=torch==2.6.0+cpu.
test-newest test-oldest test-pinned test-readme: test-%:
	$(PYTHON) tests/install/job.py $* --torch '$(TORCH)'

# The static student's part of the study's main table, from the published settings and teacher scores. DATA holds the
# collections as BEIR folders.
DATA ?= data
study-small: .venv/dev
	$(BIN)/python examples/study/study.py final --data $(DATA)
	$(BIN)/python examples/study/study.py report --data $(DATA)
	$(BIN)/python examples/study/study.py check

clean:
	rm -rf .venv .venv-* site demo-output study-output .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist *.egg-info

# torch is named so that its pinned CPU-sized version is chosen before anything else asks for the newest one.
.venv/demo: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch --editable '.[onnx]'
	@touch $@

.venv/dev: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch --editable '.[dev]'
	@touch $@ .venv/demo .venv/docs

.venv/docs: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch --editable '.[onnx,docs]'
	@touch $@ .venv/demo
