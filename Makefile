# make demo: from nothing to a picture. make test: everything CI checks. make bench: how fast.

PYTHON ?= python3
BIN := .venv/bin
OUTPUT ?= out.png
PROMPT ?= a red circle on a white background

.PHONY: demo test test-gpu bench rehearsal clean

demo: .venv/export.done
	@if [ -f engines/demo/manifest.json ]; then echo "engines/demo is there already (make clean exports it again)"; \
	else "$(BIN)/hart-export" --output engines/demo; fi
	@"$(BIN)/hart-run" --engine engines/demo "$(PROMPT)" --output "$(OUTPUT)"
	@echo "the picture is in $(CURDIR)/$(OUTPUT)"

test: .venv/dev.done
	"$(BIN)/python" -m ruff check .
	"$(BIN)/python" -m mypy
	"$(BIN)/python" -m pytest -n 2 --dist loadfile

# The same conformance suite on every backend of this machine, and why the others were left out.
test-gpu: .venv/dev.done
	"$(BIN)/python" -m pytest -v -rs tests/test_conformance.py

bench: engines/demo-fp32/manifest.json engines/mid-256px/manifest.json
	"$(BIN)/hart-bench" --engine engines/demo-fp32 --batch 1,4,8 --against torch-eager
	"$(BIN)/hart-bench" --engine engines/mid-256px --batch 1,4 --iterations 5 --warmup 1 --against torch-eager \
	--checkpoint checkpoints/mid-256px

# The published model's sizes with random weights: about an hour, 24 GB of memory, 40 GB of disk.
rehearsal: .venv/dev.done
	"$(BIN)/python" -m hart_runtime.compare.rehearsal --folder rehearsal

engines/demo-fp32/manifest.json: .venv/bench.done
	"$(BIN)/hart-export" --backend onnx --precision fp32 --output engines/demo-fp32 --force

engines/mid-256px/manifest.json: checkpoints/mid-256px/sampling.json
	"$(BIN)/hart-export" checkpoints/mid-256px --backend onnx --precision fp32 --output engines/mid-256px --force

checkpoints/mid-256px/sampling.json: .venv/bench.done
	rm -rf checkpoints/mid-256px
	"$(BIN)/python" -m hart_runtime.hart.random_checkpoint --shape mid-256px --output checkpoints/mid-256px

clean:
	rm -rf engines/demo engines/demo-fp32 engines/mid-256px checkpoints rehearsal .venv

.venv/pip.done:
	"$(PYTHON)" -m venv .venv
	@touch $@

.venv/export.done: .venv/pip.done pyproject.toml constraints.txt
	"$(BIN)/python" -m pip install --quiet --constraint constraints.txt --editable ".[export]"
	@touch $@

.venv/bench.done: .venv/pip.done pyproject.toml constraints.txt
	"$(BIN)/python" -m pip install --quiet --constraint constraints.txt --editable ".[bench,export]"
	@touch $@

.venv/dev.done: .venv/pip.done pyproject.toml constraints.txt
	"$(BIN)/python" -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@
