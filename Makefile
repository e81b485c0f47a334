# make demo: from nothing to a picture. make test: everything CI checks. make bench: how fast.

PYTHON ?= python3
BIN := .venv/bin
OUTPUT ?= out.png
TRIALS ?= 1000
PROMPT ?= a red circle on a white background

.PHONY: demo test torture test-release test-serve test-ray test-gpu test-gpu-standin gpu bench rehearsal release docs clean

demo: .venv/export.done
	@"$(BIN)/hart-export"
	@"$(BIN)/hart-run" --engine engines/demo "$(PROMPT)" --output "$(OUTPUT)"
	@echo "the picture is in $(CURDIR)/$(OUTPUT)"

test: .venv/dev.done
	"$(BIN)/python" -m ruff check .
	"$(BIN)/python" -m mypy
	"$(BIN)/python" -m pytest -n 2 --dist loadfile

# Changed bundles, kills, full disks and a soak, with one table of how each trial ended. A share of it is in
# make test. make torture TRIALS=10000 for the big one.
torture: .venv/dev.done
	"$(BIN)/python" -m tests.torture --trials "$(TRIALS)"

# README block by block, and the wheel in empty environments: five minutes, and needs the package index.
test-release: .venv/dev.done
	"$(BIN)/python" -m pytest -m release

# The server with every version of OpenAI's client that people have, under load, at its end, with the faults of
# other servers, and its page in a browser (where chromium is there): five minutes, and needs the package index.
test-serve: .venv/dev.done
	"$(BIN)/python" -m pytest -m serve -n 2 --dist loadfile

# A real Ray: hart-batch with two actors and two nodes and what is killed on the way, a Ray of another version, and the
# server on Ray Serve with OpenAI's clients and replicas that come and go. Ten minutes on two cores, and needs the
# package index.
test-ray: .venv/dev.done
	"$(BIN)/python" -m pytest -m ray

# The same conformance suite on every backend of this machine, and why the others were left out. It
# installs nothing: the environment of a GPU has [cuda,dev], never beside [cpu].
test-gpu:
	"$(BIN)/python" -m pytest -v -rs tests/test_conformance.py

# Everything that is to be known of this machine's GPU, in parts of ten minutes at most, with a summary in
# benchmarks/results/. What was carried here: make gpu OPTIONS='--engine BUNDLE --checkpoint FOLDER'. Installs nothing.
gpu:
	@"$(BIN)/python" -m hart_runtime.bench.day.cli $(OPTIONS)

# ONNX Runtime's own CUDA provider on libraries without a device: where nodes run, what is captured, copied and
# waited for, how much memory. Ten minutes; its environment is made once and needs the package index and gcc.
test-gpu-standin: .venv/dev.done .venv-gpu/dev.done
	"$(BIN)/python" -m pytest -v -m gpu_standin

bench: bundles/demo-fp32/manifest.json bundles/mid-256px/manifest.json
	"$(BIN)/hart-bench" --engine bundles/demo-fp32 --batch 1,4,8 --against torch-eager
	"$(BIN)/hart-bench" --engine bundles/mid-256px --batch 1,4 --iterations 5 --warmup 1 --against torch-eager \
	--checkpoint checkpoints/mid-256px

# The published models' sizes with random weights: about two hours, 24 GB of memory, 40 GB of disk each. And recordings
# of pruned drawings through the graphs, those below HART_GOLDEN_DIR: a pyramid of 1024 pixels takes minutes.
rehearsal: .venv/dev.done .venv-gpu/dev.done
	"$(BIN)/python" -m hart_runtime.compare.rehearsal --folder bundles/rehearsal
	"$(BIN)/python" -m hart_runtime.compare.rehearsal --folder bundles/rehearsal-var-d16 --shape var-d16-256px
	"$(BIN)/python" -m hart_runtime.compare.rehearsal --folder bundles/rehearsal-var-d36 --shape var-d36-512px
	HART_STANDIN_BUNDLES="$(CURDIR)/bundles/rehearsal/fp16" "$(BIN)/python" -m pytest -v -m gpu_standin -k rehearsal
	"$(BIN)/python" -m pytest -v -m slow tests/test_golden_pruned.py

bundles/demo-fp32/manifest.json: .venv/bench.done
	"$(BIN)/hart-export" --backend onnxruntime --precision fp32 --output bundles/demo-fp32 --force

bundles/mid-256px/manifest.json: checkpoints/mid-256px/sampling.json
	"$(BIN)/hart-export" checkpoints/mid-256px --backend onnxruntime --precision fp32 --output bundles/mid-256px --force

checkpoints/mid-256px/sampling.json: .venv/bench.done
	rm -rf checkpoints/mid-256px
	"$(BIN)/python" -m hart_runtime.hart.random_checkpoint --shape mid-256px --output checkpoints/mid-256px

# What would be uploaded, in dist/: built twice with equal bytes, checked, and drawn with on the oldest and the newest
# Python, as far as they are here. Of a commit; two minutes, and needs the package index.
release: .venv/export.done .venv-release/pip.done
	@"$(BIN)/hart-export"
	@".venv-release/bin/python" -m tests.release --bundle engines/demo

# The documents and the API as a site, in build/site. A link that leads nowhere is an error.
docs: .venv-docs/pip.done
	@".venv-docs/bin/python" -m tests.handbook.site build/documents
	@NO_MKDOCS_2_WARNING=true ".venv-docs/bin/python" -m mkdocs build --quiet --strict
	@echo "the site is in $(CURDIR)/build/site/index.html"

clean:
	rm -rf engines/demo bundles build checkpoints dist .venv .venv-gpu .venv-docs .venv-release

.venv/pip.done:
	"$(PYTHON)" -m venv .venv
	@touch $@

.venv/export.done: .venv/pip.done pyproject.toml constraints.txt
	"$(BIN)/python" -m pip install --quiet --constraint constraints.txt --editable ".[cpu,export]"
	@touch $@

.venv/bench.done: .venv/pip.done pyproject.toml constraints.txt
	"$(BIN)/python" -m pip install --quiet --constraint constraints.txt --editable ".[bench,cpu,export]"
	@touch $@

.venv/dev.done: .venv/pip.done pyproject.toml constraints.txt
	"$(BIN)/python" -m pip install --quiet --constraint constraints.txt --editable ".[cpu,dev]"
	@# Without torchvision, which transformers cannot import beside a torch of another build than its own.
	"$(BIN)/python" -m pip install --quiet --no-deps "torch-fidelity>=0.4"
	@touch $@

.venv-release/pip.done: tests/release/requirements.txt
	"$(PYTHON)" -m venv .venv-release
	".venv-release/bin/python" -m pip install --quiet --requirement tests/release/requirements.txt
	@touch $@

.venv-docs/pip.done: tests/handbook/requirements.txt
	"$(PYTHON)" -m venv .venv-docs
	".venv-docs/bin/python" -m pip install --quiet --requirement tests/handbook/requirements.txt
	@touch $@

.venv-gpu/dev.done: pyproject.toml tests/gpu_standin/requirements.txt
	"$(PYTHON)" -m venv .venv-gpu
	".venv-gpu/bin/python" -m pip install --requirement tests/gpu_standin/requirements.txt --editable .
	@touch $@
