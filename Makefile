# make demo: from nothing to a picture. make test: everything CI checks.

PYTHON ?= python3
BIN := .venv/bin
OUTPUT ?= out.png
PROMPT ?= a red circle on a white background

.PHONY: demo test test-gpu clean

demo: .venv/export.done
	@if [ -f engines/demo/manifest.json ]; then echo "engines/demo is there already (make clean exports it again)"; \
	else "$(BIN)/hart-export" --output engines/demo; fi
	@"$(BIN)/hart-run" --engine engines/demo "$(PROMPT)" --output "$(OUTPUT)"
	@echo "the picture is in $(CURDIR)/$(OUTPUT)"

test: .venv/dev.done
	"$(BIN)/python" -m ruff check .
	"$(BIN)/python" -m mypy
	"$(BIN)/python" -m pytest

# The same conformance suite on every backend of this machine, and why the others were left out.
test-gpu: .venv/dev.done
	"$(BIN)/python" -m pytest -v -rs tests/test_conformance.py

clean:
	rm -rf engines/demo .venv

.venv/pip.done:
	"$(PYTHON)" -m venv .venv
	@touch $@

.venv/export.done: .venv/pip.done pyproject.toml constraints.txt
	"$(BIN)/python" -m pip install --quiet --constraint constraints.txt --editable ".[export]"
	@touch $@

.venv/dev.done: .venv/export.done
	"$(BIN)/python" -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@
