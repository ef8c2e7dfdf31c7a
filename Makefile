# Two commands: `make demo` and `make test`. Both make .venv first; that is quick when nothing has changed.

PYTHON ?= python3
VENV ?= .venv
PORT ?= 8000
# make demo SERVE=0 ends after the answers
SERVE ?= 1
# processes that share out the test files
WORKERS ?= 2

bin := $(VENV)/bin
stamp := $(VENV)/.set-up
# What an installation depends on. Python files are used in place; the kernels are compiled.
inputs := pyproject.toml constraints.txt CMakeLists.txt $(wildcard models/kernels/csrc/*)

.PHONY: demo test lint set-up clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    install into $(VENV), train on the docstrings of this machine's packages, serve the model"
	@echo "             (SERVE=0: end after the answers; PORT=8000: where the page is)"
	@echo "make test    install, check style and types, run the whole test suite"
	@echo "             (FANIN_SKIP_BROWSER=1: without the page's tests, which need Chromium)"
	@echo "make lint    style and types only"
	@echo "make clean   remove $(VENV), build files and the demo's run"

demo: $(stamp)
	$(bin)/python -m examples.demo --port $(PORT) $(if $(filter 0,$(SERVE)),--no-serve)

test: lint chromium
	$(bin)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(stamp)
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy

set-up: $(stamp)

# The constraints also hold in pip's isolated build environment: PIP_CONSTRAINT for older pips, PIP_BUILD_CONSTRAINT since 25.3.
$(stamp): $(inputs)
	@command -v $(or $(CXX),g++) >/dev/null || { echo "A C++ compiler is needed to build the kernels: apt-get install g++"; exit 1; }
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "Cannot make $(VENV): is python3-venv installed?"; exit 1; }
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt PIP_BUILD_CONSTRAINT=$(CURDIR)/constraints.txt \
		$(bin)/python -m pip install --editable '.[dev]'
	touch $@

# The page is tested in a real browser; FANIN_SKIP_BROWSER=1 leaves those tests out.
.PHONY: chromium
chromium:
	@[ "$$FANIN_SKIP_BROWSER" != 1 ] || exit 0; \
	for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	{ \
		[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& apt-get update -qq && apt-get install --yes --no-install-recommends chromium; \
	} || { \
		echo "The page's tests need Chromium, and it cannot be installed here."; \
		echo "Install it, or leave these tests out: make test FANIN_SKIP_BROWSER=1"; exit 1; \
	}

clean:
	rm -rf $(VENV) build runs/demo
