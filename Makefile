# Two commands on a fresh machine: `make demo` and `make test`. Each makes .venv when it is not current.
.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow test-all check docs format clean

PY := .venv/bin/python
PYTEST := $(PY) -m pytest -n 2 --dist loadscope --no-loadscope-reorder --durations 30
# What failed beside another process's tests has to pass by itself: see docs/decisions.md.
ONCE_MORE := { echo "once more, one by one:" && $(PY) -m pytest --last-failed --last-failed-no-failures none -x -v; }

help:  ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv:  ## make .venv with the tested set (nothing happens when it is current)
	@bash infra/venv.sh

demo: venv  ## the whole loop on this machine: data, training, serving, a report page
	@.venv/bin/dim demo

test: check  ## lint, types, layout and the tests, without those of minutes
	$(PYTEST) -m "not slow" || $(ONCE_MORE)

test-slow: venv  ## the tests of minutes alone
	$(PYTEST) -m slow || $(ONCE_MORE)

test-all: test test-slow  ## lint, types, layout and every test

check: venv  ## lint, format, types and layout only
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports --no-cache

docs: venv  ## the pages as a site in site/; a broken link or reference is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

format: venv  ## rewrite the code in the house format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:  ## remove .venv, caches and site/, nothing else
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache site
