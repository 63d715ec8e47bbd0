# Two commands: `make demo` runs the whole chain on embedded images, `make test` checks the project.
# Both make the environment in .venv from the hashed locks in envs/ first, once.

PYTHON ?= python3
CORES ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
BIN := .venv/bin
FILES := $(wildcard $(shell git ls-files --cached --others --exclude-standard 2>/dev/null))
# Steps share the cores among processes of one thread each; libraries must not start more of their own.
export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help demo figures bench bench-channels channels rooms modules schema test quick lint format lock clean

help:
	@echo "make demo     run the whole chain on handwritten digits (config.yaml)"
	@echo "make figures  draw the report of the measured results in docs/results, without computing anything else"
	@echo "make bench    measure speed and memory against plain code and peers, into benchmarks/"
	@echo "make bench-channels  compare smaller networks with other tools' of equal multiply-adds, into benchmarks/;"
	@echo "              FRONT=results/… adds the front of experiments/faster-resnet56.yaml"
	@echo "make test     lint, type check and tests"
	@echo "make quick    the tests of masks, search and configuration, which take no networks"
	@echo "make channels survey what can be cut of torchvision's and timm's networks (hours)"
	@echo "make rooms    draw the packages and their imports, into docs/rooms.svg"
	@echo "make modules  list the modules behind each step again, into tests/workflow/modules_of_steps.yaml"
	@echo "make schema   write the schema of the configuration and docs/configuration.md from the settings"
	@echo "make format   format the code"
	@echo "make lock     resolve the dependencies of pyproject.toml again"
	@echo "make clean    remove .venv and caches, never results"

demo: .venv/run.stamp
	$(BIN)/snakemake --cores $(CORES)
	@echo "The report is at results/report/index.html"

figures: .venv/run.stamp
	$(BIN)/snakemake figures --workflow-profile profiles/figures \
		--configfile experiments/cifar10-sample-resnet20.yaml --config inputs_needed=False results_directory=docs/results
	@echo "The report is at docs/results/report/index.html"

bench: .venv/run.stamp
	PYTHONPATH=workflow/scripts $(BIN)/python -m benchmarks
	@echo "The figures are in benchmarks/results.json, results.md and results.png"

bench-channels: .venv/run.stamp
	PYTHONPATH=workflow/scripts $(BIN)/python -m benchmarks.channels $(if $(FRONT),--front $(FRONT))
	@echo "The tables are in benchmarks/channels.json, channels.md and channels.png"

channels: .venv/dev.stamp
	PYTHONPATH=workflow/scripts:tests $(BIN)/python docs/survey_channels.py
	@echo "The table is in docs/channels-networks.md"

rooms: .venv/dev.stamp
	PYTHONPATH=workflow/scripts:tests $(BIN)/python docs/draw_rooms.py
	@echo "The drawing is docs/rooms.svg"

modules: .venv/dev.stamp
	PYTHONPATH=workflow/scripts $(BIN)/python tests/list_modules.py
	@echo "The list is tests/workflow/modules_of_steps.yaml"

schema: .venv/run.stamp
	PYTHONPATH=workflow/scripts $(BIN)/python -m paretoprune.workflow.schema
	@echo "The schema is workflow/schemas/config.schema.yaml, the table docs/configuration.md"

# Runs again only when a file of the project has changed since everything passed; .venv/bin/pytest always runs.
test: .venv/test.stamp
	@echo "All checks passed."

.venv/test.stamp: .venv/dev.stamp $(FILES)
	$(MAKE) --no-print-directory lint
	$(BIN)/pytest --numprocesses $(CORES) --dist loadfile --no-loadscope-reorder
	@touch $@

# Without the tests that train networks or run searches on them.
LONG := $(foreach name,api benchmarks brought_networks library_inputs other_layers,tests/test_$(name).py)

quick: .venv/dev.stamp
	$(BIN)/pytest --numprocesses $(CORES) --dist loadfile --no-loadscope-reorder -m "not workflow" \
		tests/masks tests/search tests/workflow $(filter-out $(LONG),$(wildcard tests/test_*.py))

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint
	$(BIN)/mypy

format: .venv/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile workflow

lock: .venv/dev.stamp
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-header --python-version 3.11 \
		--constraint envs/constraints.txt --extra workflow --extra deploy pyproject.toml --output-file envs/requirements.lock
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-header --python-version 3.11 \
		--constraint envs/constraints.txt --constraint envs/requirements.lock --extra workflow --extra deploy --extra dev \
		pyproject.toml --output-file envs/requirements-dev.lock

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/python.stamp:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0] + "; call make with PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	@touch $@

# The development lock holds the same versions and more, so whichever comes second only adds what is missing.
.venv/run.stamp: envs/requirements.lock | .venv/python.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement $<
	@touch $@

.venv/dev.stamp: envs/requirements-dev.lock .venv/run.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement $<
	@touch $@
