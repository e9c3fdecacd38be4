# make run    install into .venv, then train and score one tokenizer on the embedded photographs
# make test   install into .venv, then run every test
PYTHON ?= python3
BACKBONE ?= convnext
WORKERS ?= auto

# Its Triton kernels alone, which the tests interpret: the compiled rest needs CUDA, and there pip install '.[mamba]'.
MAMBA_SSM = .venv/bin/python -c "import sys, torch; sys.exit(torch.cuda.is_available())" && \
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE .venv/bin/python -m pip install --quiet \
	--constraint constraints.txt --no-build-isolation --no-deps mamba-ssm

.PHONY: run test lint mutants
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@echo "installing into .venv, which takes some two minutes"
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-dev: .venv/installed
	@echo "installing what tests need into .venv, which takes some minutes"
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(MAMBA_SSM) || echo "mamba-ssm not installed: its parity tests will be skipped"
	touch $@

run: .venv/installed
	.venv/bin/python -m bench.run --backbone $(BACKBONE)

test: .venv/installed-dev
	.venv/bin/python -m pytest -m "slow or not slow" --numprocesses $(WORKERS) --dist loadgroup --durations 15

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# Not a part of `test`: puts wrong versions of the code in place and sees whether a test notices; about twenty minutes.
mutants: .venv/installed-dev
	.venv/bin/python -m tests.mutants
