# Every target but gpu sets up .venv first. `make help` lists them.
PYTHON ?= python3
VENV := .venv
NEQBENCH := $(VENV)/bin/neqbench
ARGS ?=
JOBS ?= 3
SUITE ?= cifar10
ADDRESS ?= http://127.0.0.1:8265
RESULTS ?= $(CURDIR)/results

.DEFAULT_GOAL := help
.PHONY: help setup bench bench-segmentation test test-all test-oldest test-newest lint faults gpu cifar10 imagenet segmentation report submit wheel docs

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-18s %s\n", $$1, $$2}'

setup: $(VENV)/.done ## install into .venv

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev]'
	@touch $@

bench: setup ## train baseline, NEq and control on handwritten digits; print the report
	$(NEQBENCH) run digits $(ARGS)

bench-segmentation: setup ## the same with a label for each pixel of composed scenes
	$(NEQBENCH) run segmentation-digits $(ARGS)

cifar10: setup ## the paper's CIFAR-10 suite (250 epochs; wants a GPU)
	$(NEQBENCH) run cifar10 $(ARGS)

imagenet: setup ## the paper's ImageNet suite, ResNet-18 (wants the data and GPUs)
	$(NEQBENCH) run imagenet $(ARGS)

segmentation: setup ## the paper's DeepLabv3 suite on COCO (wants the data and GPUs)
	$(NEQBENCH) run segmentation $(ARGS)

report: setup ## print the report of everything below results/ (ARGS="--format html" for a page)
	$(NEQBENCH) report results $(ARGS)

submit: setup ## run SUITE as a job on the Ray cluster at ADDRESS, results in RESULTS
	$(NEQBENCH) submit $(SUITE) --address $(ADDRESS) --results $(RESULTS) $(ARGS)

faults: setup ## kill workers, nodes and drivers at random; compare with an undisturbed run
	$(VENV)/bin/python tests/faults.py $(ARGS)

# Nothing is installed or downloaded: it takes what $(PYTHON) has.
gpu: ## tests, speed tables and epochs of cifar10 on this GPU in 10 minutes (ARGS="--data FOLDER")
	$(PYTHON) tests/gpu_kit.py --results $(RESULTS) $(ARGS)

# Three on two cores: many tests wait for other processes.
test: setup ## the tests that CI runs, the docs among them, JOBS at a time (minutes)
	$(VENV)/bin/python -m pytest -m 'not slow' -n $(JOBS) --dist worksteal $(ARGS)

test-all: setup ## all tests: those that train longer, start clusters or kill processes, too
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

# Packages of that age deprecate each other, so warnings are not errors here.
test-oldest: .venv-oldest/.done ## all tests with the lowest versions that pyproject.toml allows
	.venv-oldest/bin/python -m pytest -W default -n $(JOBS) --dist worksteal $(ARGS)

test-newest: .venv-newest/.done ## all tests with torch 2.14.1
	.venv-newest/bin/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

.venv-oldest/.done: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints-oldest.txt --editable '.[dev]'
	@touch $@

.venv-newest/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-newest
	grep -vE '^torch(vision)?==' constraints.txt > .venv-newest/constraints.txt
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint .venv-newest/constraints.txt torch==2.14.1 torchvision==0.29.1 \
		--editable '.[dev]'
	@touch $@

lint: setup ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

wheel: setup ## build dist/, and try the wheel in an empty environment
	rm -rf dist
	$(VENV)/bin/python -m build
	PYTHON=$(PYTHON) tests/wheel.sh dist/*.whl

# Pages, and what they link to.
PAGES := *.md LICENSE cluster docs harness neq suites results/README.md results/evidence
docs: setup ## the site of these pages, in build/site; links that lead nowhere are errors
	rm -rf build/docs build/site
	mkdir -p build/docs
	find $(PAGES) -type f '(' -name '*.md' -o -name '*.svg' -o -name '*.png' -o -name '*.css' \
		-o -name '*.toml' -o -path 'cluster/*' -o -name LICENSE ')' \
		| tar -cf - -T - | tar -xf - -C build/docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --config-file docs/mkdocs.yml
