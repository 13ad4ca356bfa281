# Two commands: `make demo` and `make test`. Each sets up .venv by itself; nothing else is needed.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check-fast test-bare test-exports test-evaluate fuzz crash lint fmt bench gpu gpu-rehearsal docs site clean

demo: .venv/demo.stamp
	@echo "demo: quantizing a small trained transformer (about 2 minutes on two cores); report in demo/report.html"
	@$(BIN)/loraq demo --emoji benchmarks/assets/emoji --out demo

test: .venv/dev.stamp lint
	@echo "test: the whole suite, one process for each core"
	@$(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder

check-fast: .venv/dev.stamp lint
	@echo "check-fast: the suite without slow tests"
	@$(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slow"

crash: .venv/dev.stamp
	@echo "crash: runs are killed before each of their system calls that change the disk (6 minutes)"
	@$(BIN)/python -m tests.crash
	@echo "crash: ranks, agents and hosts of small clusters are killed at random (2 minutes)"
	@$(BIN)/python -m tests.crash.ranks

lint: .venv/dev.stamp
	@echo "lint: format, style, types"
	@$(BIN)/ruff format --check --quiet . && $(BIN)/ruff check --quiet . && $(BIN)/mypy --no-error-summary

fmt: .venv/dev.stamp
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

bench: .venv/dev.stamp
	@echo "bench: quantize throughput, scale rules, solver error per second"
	@for question in speed.rounding quality.scale_rules quality.methods; do \
		$(BIN)/python -m benchmarks.$$question || exit 1; done

# On a machine with a GPU. A torch that $(PYTHON) has is used as it is (make gpu PYTHON=...); without
# one the tested version is installed, whose build on PyPI for Linux is that for CUDA.
gpu: .venv-gpu/stamp
	@echo "gpu: tests, timings, memory and graph capture on the first GPU (at most 25 minutes)"
	@.venv-gpu/bin/python -m benchmarks.gpu.run

gpu-rehearsal: .venv/dev.stamp
	@echo "gpu-rehearsal: every step of make gpu on this CPU, in small (2 minutes)"
	@$(BIN)/pytest tests/rehearse_gpu.py

docs: .venv/dev.stamp
	@echo "docs: the pages that are generated"
	@$(BIN)/python -m docs.generate

fuzz: .venv/dev.stamp
	@echo "fuzz: every reader against 24 000 mutated files (6 minutes on two cores)"
	@$(BIN)/python -m tests.fuzz

# The targets' own loaders and arithmetic, in an environment of its own: sdnq is GPL, and no part of
# loraq depends on it. Of cache-dit one file is read, so it comes without what it requires.
test-exports: .venv-exports/stamp
	@echo "test-exports: every target of loraq export by its own code (3 minutes)"
	@.venv-exports/bin/python -m pytest tests/exports/proofs/prove_*.py tests/kernels/test_openvino.py

site: .venv/dev.stamp .venv-docs/stamp
	@echo "site: the documentation in site/, where every stale page and every broken link is an error"
	@$(BIN)/python -m docs.generate --check
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

# FID by torch-fidelity, resizing by clean-fid. Both want torchvision, which is built for CUDA: they lie
# beside the environment, without it, and without the package `tests` that one of them installs.
test-evaluate: .venv/dev.stamp
	@echo "test-evaluate: FID by torch-fidelity and clean-fid, without torchvision (a minute)"
	@rm -rf .venv-evaluate && $(PIP) --no-deps --target .venv-evaluate torch-fidelity clean-fid
	@rm -rf .venv-evaluate/tests
	@PYTHONPATH=.venv-evaluate $(BIN)/pytest tests/evaluation/test_networks.py tests/evaluation/test_paired.py -m 'not slow'

# A user's first minute: the wheel without extras, and nothing else. TORCH chooses a version.
TORCH ?= 2.13.0
test-bare: .venv/dev.stamp
	@echo "test-bare: the wheel without extras, torch $(TORCH), in an environment of its own"
	@rm -rf .venv-bare && $(PYTHON) -m venv .venv-bare
	@$(BIN)/python -m hatchling build -t wheel -d .venv-bare/wheel
	@.venv-bare/bin/pip install --quiet --disable-pip-version-check torch==$(TORCH) .venv-bare/wheel/*.whl
	@.venv-bare/bin/python -I -c "import loraq" && .venv-bare/bin/python tests/bare/__main__.py

clean:
	rm -rf .venv .venv-bare .venv-docs .venv-exports .venv-gpu demo gpu-logs site

.venv/torch.stamp: constraints.txt
	@echo "setup: making .venv and installing torch (once, about a minute)"
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is required: make PYTHON=..."'
	@$(PYTHON) -m venv .venv
	@$(PIP) torch==2.13.0
	@touch $@

.venv-exports/stamp: constraints.txt pyproject.toml
	@echo "setup: making .venv-exports with the programs that load exports (once, some minutes)"
	@$(PYTHON) -m venv .venv-exports
	@.venv-exports/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	@.venv-exports/bin/pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e '.[dev,onnx,openvino]' gguf sdnq kernels onnxruntime comfy-kitchen
	@.venv-exports/bin/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps cache-dit
	@touch $@

# What is installed beside torch must not replace it, so its version is a constraint, and Triton is
# that which came with it.
.venv-gpu/stamp: constraints.txt pyproject.toml
	@echo "setup: making .venv-gpu around the torch of $(PYTHON) (once, some minutes)"
	@$(PYTHON) -m venv .venv-gpu
	@place=$$(.venv-gpu/bin/python -c 'import site; print(site.getsitepackages()[0])') && \
		$(PYTHON) -c 'import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])' \
		> $$place/torch.pth 2>/dev/null || .venv-gpu/bin/pip install --quiet \
		--disable-pip-version-check -c constraints.txt torch==2.13.0
	@.venv-gpu/bin/python -c 'import torch; print("torch==" + torch.__version__)' > .venv-gpu/torch.txt
	@.venv-gpu/bin/pip install --quiet --disable-pip-version-check -c .venv-gpu/torch.txt -e '.[demo]' \
		pytest hypothesis beartype ml_dtypes safetensors
	@touch $@

.venv-docs/stamp: constraints.txt
	@echo "setup: making .venv-docs with the builder of the documentation"
	@$(PYTHON) -m venv .venv-docs
	@.venv-docs/bin/pip install --quiet --disable-pip-version-check -c constraints.txt \
		mkdocs mkdocs-material mkdocstrings-python
	@touch $@

.venv/demo.stamp: .venv/torch.stamp pyproject.toml
	@echo "setup: installing loraq with the demo's packages"
	@$(PIP) -e '.[demo]'
	@touch $@

.venv/dev.stamp: .venv/torch.stamp pyproject.toml
	@echo "setup: installing loraq with the packages for tests"
	@$(PIP) -e '.[dev]'
	@touch $@ .venv/demo.stamp
