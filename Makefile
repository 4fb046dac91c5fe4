# `make demo` and `make test` do all the set-up on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where pip would fetch PyTorch's CUDA build and you want the CPU one:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
JOBS ?= 2
# A part of the mutation run: make mutants MUTANTS='trueup.objectives.value.*'
MUTANTS ?=
# Models of make bench-gpu
GPU_SIZES ?= 0.5b 1.5b

.PHONY: demo test test-slow lint format mutants bench bench-grpo bench-rollout bench-gpu clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(if $(TORCH_INDEX),$(BIN)/pip install -q -c constraints.txt torch --index-url $(TORCH_INDEX))
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed  ## train a tiny model through SFT, reward model, DPO, PPO, GRPO
	$(BIN)/trueup demo

test: $(VENV)/.installed  ## the everyday tests
	$(BIN)/pytest -n $(JOBS) --dist worksteal -q

test-slow: $(VENV)/.installed  ## the long tests
	$(BIN)/pytest -n $(JOBS) --dist worksteal -q -m slow --timeout 3600

lint: $(VENV)/.installed  ## style, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/.installed  ## rewrite the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv-mutants/.installed: $(VENV)/.installed benchmarks/mutants-requirements.txt
	$(BIN)/python -m venv .venv-mutants
	$(BIN)/python -c 'import site; print(*site.getsitepackages())' > \
	  $$(.venv-mutants/bin/python -c 'import site; print(*site.getsitepackages())')/project.pth
	.venv-mutants/bin/pip install -q -c constraints.txt -r benchmarks/mutants-requirements.txt
	@touch $@

mutants: .venv-mutants/.installed  ## change the formulas one by one: which change does no test notice?
	.venv-mutants/bin/python benchmarks/mutants.py --jobs $(JOBS) $(MUTANTS)

bench: $(VENV)/.installed  ## step times beside TRL, in an environment of its own
	$(PYTHON) benchmarks/run.py

bench-grpo: $(VENV)/.installed  ## the same for GRPO
	$(PYTHON) benchmarks/run.py --objectives grpo --precision bfloat16 --output build/bench-grpo

bench-rollout: $(VENV)/.installed  ## sampling alone beside transformers and vLLM
	$(PYTHON) benchmarks/rollout.py

bench-gpu: $(VENV)/.installed  ## all of these with larger models on a CUDA device
	@for size in $(GPU_SIZES); do \
	  for script in "run.py --objectives dpo sft reward grpo --output build/bench-gpu-$$size" \
	                "rollout.py --output build/rollout-gpu-$$size"; do \
	    $(PYTHON) benchmarks/$$script --device cuda --model-size $$size --precision bfloat16 --allocators default \
	      --cases short-32k long-32k large-152k || exit; \
	  done; \
	done

clean:
	rm -rf $(VENV) .venv-trl* .venv-vllm* .venv-mutants mutants .pytest_cache .ruff_cache build src/*.egg-info
