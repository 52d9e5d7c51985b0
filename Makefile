# Every target sets up what it needs in its own virtual environment. Variables:
#   TORCH   the torch to develop on, as pip takes it; add --index-url for the CPU build where pip would pick another
#   PYTHON  the interpreter the environment is made with
#   VENV    where the environment lies
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN = $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
NATIVE = $(shell find csrc -type f)
ON_GPU = $(addprefix tests/test_,$(addsuffix .py,gpu ops minibatch_discrimination minibatch_stddev spectral_norm gradient_penalty \
	pairwise_kernel_sum nearest_distances tuning losses features critic_step critic_joint critic_fuzz accelerate accelerate_spectral))

.PHONY: demo test lint bench gpu-check wheel clean

demo: $(VENV)/built
	$(BIN)/fastgan demo --out out/demo

# Two legs: plain torch and the native kernels, then Triton's interpreter, which has to be chosen before Python starts; a third
# where there is a GPU.
# MALLOC_PERTURB_ fills fresh C memory with a pattern, so that a kernel that reads what it did not write is caught.
test: $(VENV)/built
	MALLOC_PERTURB_=85 $(BIN)/python -m pytest -q -n 2 --dist worksteal
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal tests/test_ops.py tests/test_minibatch_discrimination.py \
		tests/test_minibatch_stddev.py
	if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then \
		$(BIN)/python -m pytest -q -n 4 --dist loadgroup --device cuda $(ON_GPU); fi

lint: $(VENV)/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/built
	$(BIN)/python -m benchmarks --out out/bench

gpu-check: $(VENV)/built
	$(BIN)/python tests/gpu_tools.py
	$(BIN)/python -m pytest -q -m gpu_check -rs

wheel: $(VENV)/tools
	$(BIN)/pip wheel --no-build-isolation --no-deps -w dist .

clean:
	rm -rf build dist out *.egg-info fastgan/_C*.so

$(VENV)/tools: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH)
	FASTGAN_BUILD=python $(BIN)/pip install -q -e '.[dev]'
	touch $@

$(VENV)/built: $(VENV)/tools setup.py $(NATIVE)
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@
