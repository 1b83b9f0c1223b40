# make bench · demo · test · lint: each sets itself up in .venv; only Python >= 3.10 and make have to be there.
# make gpu uses $(PYTHON) as it is: PyTorch with CUDA is there already, and a network may not be.
PYTHON ?= python3
VENV := .venv
# what make compare sets side by side: git's names of commits; a dot is the tree as it is, with what was not committed
A ?= HEAD
B ?= .
BIN := $(VENV)/bin
# torch first and by exact version: a plain pin takes the small build, a range may pull gigabytes of CUDA libraries
TORCH := $(shell grep -o '^torch==[^ ;]*' constraints.txt)

# what torch 2.11 ships; make kernels compiles with it and with the newest, which is in constraints.txt
OLD_TRITON := 3.6.0

.PHONY: bench bench-full compare demo test gpu kernels lint check clean

bench: $(VENV)/.ready  ## the quick benchmark, then a language model trained by both
	$(BIN)/python -m bench --quick
	$(BIN)/python examples/char_lm.py

bench-full: $(VENV)/.ready  ## every case of the benchmark
	$(BIN)/python -m bench

compare: $(VENV)/.ready  ## two commits side by side, A and B: fails where B is slower or takes more memory
	$(BIN)/python -m bench compare $(A) $(B) $(ARGS)

demo: $(VENV)/.ready  ## gradient flow: what plain RNNs and LSTMs keep of a gradient, and learn, in under five minutes
	$(BIN)/python -m lstmcore flow --out out/flow

test: $(VENV)/.ready  ## the tests
	$(BIN)/pytest tests

gpu:  ## tests, experiments and the quick benchmark on a CUDA GPU, within ten minutes; ARGS="--stage bench", ...
	$(PYTHON) -m bench gpu $(ARGS)

kernels: $(VENV)/.ready build/triton-$(OLD_TRITON)/.ready  ## compile every GPU kernel without a GPU, and report
	$(BIN)/python -m bench kernels --csv out/kernels/newest.csv $(ARGS)
	PYTHONPATH=build/triton-$(OLD_TRITON) $(BIN)/python -m bench kernels --csv out/kernels/$(OLD_TRITON).csv $(ARGS)

build/triton-$(OLD_TRITON)/.ready:
	$(BIN)/python -m pip install -q --no-deps --target $(@D) triton==$(OLD_TRITON)
	touch $@

# mypy finds modules by their paths, so it gets a tree in which kernels/ lies where it is installed
lint: $(VENV)/.ready  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types/lstmcore
	ln -sfn $(CURDIR)/lstmcore/*.py $(CURDIR)/lstmcore/py.typed $(CURDIR)/lstmcore/backends $(CURDIR)/lstmcore/flow $(CURDIR)/kernels build/types/lstmcore/
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p lstmcore

check: $(VENV)/.ready  ## parity with torch.nn.LSTM on this machine
	$(BIN)/python -m lstmcore check

clean:  ## remove what the other targets made
	rm -rf $(VENV) build

$(VENV)/.ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt '$(TORCH)'
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@
