# `make help` lists the targets. Everything is installed inside the tree: `.venv` holds ONNX Runtime for the engine,
# `export/.venv` holds PyTorch and transformers for training, conversion and tests.

PYTHON ?= python3
MODEL_PYTHON := export/.venv/bin/python
SWIFTSHADER := target/swiftshader
QEMU := target/qemu
BROWSER := target/browser
PROMETHEUS := target/prometheus
VLLM := target/vllm
SCENES ?= 1000
GENERATIONS ?= 10000
FUZZ_COUNT ?= 100000
SHAPE ?= medium
RECIPES ?= exact,fast
ROUNDS ?= 5

.DEFAULT_GOAL := help
.PHONY: help run setup setup-webgpu setup-openvino setup-qemu setup-browser setup-kserve setup-langchain setup-vllm setup-prometheus setup-export build test test-rust test-python test-avx2 test-arm64 fmt demo-models evaluate parity bench bench-serve fuzz promises clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

run: setup build ## set up, build, caption the sample pictures with models/demo-opt
	target/release/blip2 caption models/samples/*.png

setup: .venv/.stamp ## ONNX Runtime for the engine

.venv/.stamp: export/runtime.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r export/runtime.txt
	touch $@

setup-webgpu: .venv/.webgpu $(SWIFTSHADER)/.stamp ## the WebGPU plugin, and a device in software to test it on

.venv/.webgpu: .venv/.stamp export/webgpu.txt
	-.venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r export/webgpu.txt && touch $@
	@test -e $@ || echo "skipped: no WebGPU plugin for this system"

# Debian's browser brings a Vulkan device that needs no GPU; it is unpacked, not installed, so that nobody has to be root.
$(SWIFTSHADER)/.stamp:
	mkdir -p $(SWIFTSHADER)
	-cd $(SWIFTSHADER) && apt-get download -qq chromium-common && dpkg -x *.deb . && \
		mv usr/lib/chromium/*vk_swiftshader* usr/lib/chromium/libvulkan.so.1 . && rm -r *.deb usr && touch .stamp
	@test -e $@ || echo "skipped: no software device, for apt-get cannot download chromium-common here"

setup-openvino: .venv/.openvino $(QEMU)/.stamp ## the OpenVINO plugin, and an Intel processor to test it on

.venv/.openvino: .venv/.stamp export/openvino.txt
	-.venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r export/openvino.txt && touch $@
	@test -e $@ || echo "skipped: no OpenVINO plugin for this system"

setup-qemu: $(QEMU)/.stamp ## processors that this machine is not, emulated

$(QEMU)/.stamp:
	mkdir -p $(QEMU)/unpacked
	-cd $(QEMU)/unpacked && apt-get download -qq qemu-user-static && dpkg -x *.deb . && \
		mv usr/bin/qemu-x86_64-static usr/bin/qemu-aarch64-static .. && touch ../.stamp
	rm -r $(QEMU)/unpacked
	@test -e $@ || echo "skipped: no emulated processors, for apt-get cannot download qemu-user-static here"

setup-browser: $(BROWSER)/.stamp ## a browser without a window, to test reports in

# With the libraries that the system lacks.
$(BROWSER)/.stamp:
	mkdir -p $(BROWSER)/unpacked
	-cd $(BROWSER)/unpacked && apt-get download -qq chromium-headless-shell chromium-common $$(apt-get --simulate install \
		--no-install-recommends chromium-headless-shell | awk '/^Inst/ && !/chromium/ { print $$2 }') && \
		for package in *.deb; do dpkg -x $$package . || exit 1; done && rm *.deb && touch ../.stamp
	@test -e $@ || echo "skipped: no browser, for apt-get cannot download chromium-headless-shell here"

setup-kserve: target/kserve/.stamp ## Triton's clients, to test the Open Inference Protocol with

# An environment of their own: they need another protobuf than ONNX has here.
target/kserve/.stamp: export/kserve.txt
	$(PYTHON) -m venv target/kserve
	target/kserve/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r export/kserve.txt
	touch $@

setup-langchain: target/langchain/.stamp ## LangChain's clients, to rank and to chat with in tests

# An environment of their own: its reranker needs an older `cohere` than is tested here by itself.
target/langchain/.stamp: export/langchain.txt
	$(PYTHON) -m venv target/langchain
	target/langchain/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r export/langchain.txt
	touch $@

setup-vllm: $(VLLM)/.stamp ## vLLM's own client, to measure a server with in tests

# vLLM's wheel holds it as a program by itself, which needs neither the other 800 MB nor PyTorch.
$(VLLM)/.stamp: export/vllm.txt
	mkdir -p $(VLLM)/unpacked
	-$(PYTHON) -m pip download --quiet --disable-pip-version-check --require-hashes --no-deps --only-binary :all: \
		--dest $(VLLM)/unpacked -r export/vllm.txt && \
		$(PYTHON) -c "import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extract('vllm/vllm-rs', '$(VLLM)')" $(VLLM)/unpacked/*.whl && \
		chmod +x $(VLLM)/vllm/vllm-rs && touch $@
	rm -r $(VLLM)/unpacked
	@test -e $@ || echo "skipped: no client of vLLM for this system"

setup-prometheus: $(PROMETHEUS)/.stamp ## Prometheus, to read the metrics of a server in tests

$(PROMETHEUS)/.stamp:
	mkdir -p $(PROMETHEUS)/unpacked
	-cd $(PROMETHEUS)/unpacked && apt-get download -qq prometheus && dpkg -x *.deb . && rm *.deb && touch ../.stamp
	@test -e $@ || echo "skipped: no Prometheus, for apt-get cannot download it here"

setup-export: export/.venv/.stamp ## PyTorch and transformers for export/

export/.venv/.stamp: export/requirements.txt
	$(PYTHON) -m venv export/.venv
	$(MODEL_PYTHON) -m pip install --quiet --disable-pip-version-check --require-hashes -r export/requirements.txt
	touch $@

build: ## the release binary
	cargo build --release --locked

test: test-rust test-python ## every test

test-rust: setup
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	cargo test --locked
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --locked --quiet

# The engine is compared with transformers through the binary that `cargo test` built.
test-python: setup-export test-rust
	cd export && .venv/bin/ruff format --check . && .venv/bin/ruff check .
	cd export && OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= .venv/bin/python -m pytest -q --numprocesses auto --maxprocesses 4 \
		--dist loadfile --no-loadscope-reorder

test-avx2: setup setup-export setup-qemu build ## every bundle and recipe on an emulated processor with AVX2 and no VNNI (minutes)
	PYTHONPATH=export $(MODEL_PYTHON) -m blip2_export emulate avx2

test-arm64: setup setup-export setup-qemu ## the same on an emulated arm64 processor, for which the engine is built here (minutes)
	tests/arm64.sh

fmt: setup-export ## format Rust and Python
	cargo fmt
	cd export && .venv/bin/ruff format . && .venv/bin/ruff check --fix .

demo-models: WORK ?= target/demo
demo-models: setup-export ## train the models of models/ from nothing (hours; goes on after a kill)
	$(call demo,demo-opt,--stage stage2 --llm opt)
	$(call demo,demo-t5,--stage stage2 --llm t5)
	$(call demo,demo-itm,--stage stage1)
	$(call demo,demo-vqa,--stage vqa --llm opt)

define demo
	cd export && .venv/bin/python -m blip2_export train demo --work ../$(WORK) --out ../$(WORK)/$(1) $(2)
	cd export && .venv/bin/python -m blip2_export convert ../$(WORK)/$(1) ../models/$(1) --force
endef

evaluate: setup-export setup build ## how true every bundle under models/ is on SCENES held-out scenes
	set -e; for facts in models/*/bundle.json; do \
		PYTHONPATH=export $(MODEL_PYTHON) -m blip2_export evaluate --model "$${facts%/bundle.json}" --count $(SCENES); \
	done

parity: setup-export setup build ## GENERATIONS texts of random checkpoints of every family in the engine and in transformers
	PYTHONPATH=export $(MODEL_PYTHON) -m blip2_export parity --all --generations $(GENERATIONS)

bench: WORK ?= target/bench
bench: setup-export setup build ## the engine and transformers in turns on a random model of SHAPE in RECIPES, ROUNDS times; models stay in WORK, reports in WORK/reports
	PYTHONPATH=export $(MODEL_PYTHON) -m blip2_export bench --shape $(SHAPE) --recipes $(RECIPES) --rounds $(ROUNDS) --work $(WORK)

bench-serve: WORK ?= target/bench
bench-serve: setup-export setup build ## `blip2 serve` and `transformers` behind FastAPI in turns, on a model of SHAPE or on CHECKPOINT; ALSO: NAME=URL or NAME=COMMAND of another server
	PYTHONPATH=export $(MODEL_PYTHON) -m blip2_export bench-serve --shape $(SHAPE) --recipes $(RECIPES) --rounds $(ROUNDS) --work $(WORK) \
		$(if $(CHECKPOINT),--checkpoint '$(CHECKPOINT)') $(if $(ALSO),--also '$(ALSO)')

fuzz: ## FUZZ_COUNT damaged pictures of all formats: none panics, takes 2 seconds or 1 GB
	FUZZ_COUNT=$(FUZZ_COUNT) cargo test --release --locked --test fuzz -- --ignored --nocapture --test-threads=1

promises: setup ## what a server promises under load: overload, 100,000 damaged requests, SOAK_MINUTES of mixed load; on a machine that does nothing else
	cargo test --release --locked --test serve promises -- --ignored --nocapture --test-threads=1

clean: ## remove what the build made, keep the environments
	cargo clean
