# make bench · report · demo · test · lint · docs: each sets itself up in .venv (libraries: in build/libraries); only Python >= 3.10 and make have to be there.
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

# public libraries that train LSTMs, by which can be installed beside each other; the names are those of the files in
# bench/libraries and tests/libraries, and every version is in tests/libraries/<group>.txt
rl := sb3_contrib torchrl
training := skorch lightning accelerate opacus
forecasting := pytorch_forecasting neuralforecast darts
language := flair stanza
speech := speechbrain encodec
training_tests := $(foreach name,flops opacus tools,tests/torch/test_$(name).py)
GROUPS ?= rl training forecasting language speech

.PHONY: test-libraries bench-libraries bench bench-full report compare demo test test-fast gpu kernels lint docs site check dist matrix clean build/types

bench: $(VENV)/.ready  ## the quick benchmark, then a language model trained by both
	$(BIN)/python -m bench --quick
	$(BIN)/python examples/char_lm.py

bench-full: $(VENV)/.ready  ## every case of the benchmark
	$(BIN)/python -m bench

report: $(VENV)/.ready  ## every table, plot and page from the committed rows; build/report.html is one page of it all
	$(BIN)/python -m bench report

compare: $(VENV)/.ready  ## two commits side by side, A and B: fails where B is slower or takes more memory
	$(BIN)/python -m bench compare $(A) $(B) $(ARGS)

demo: $(VENV)/.ready  ## gradient flow: what plain RNNs and LSTMs keep of a gradient, and learn, in under five minutes
	$(BIN)/python -m lstmcore flow --out out/flow

# A worker a core, and none where there is one; one that is lost, as by a test that hangs, ends the run.
PARALLEL := -n auto --dist loadgroup --max-worker-restart 0

test: $(VENV)/.ready  ## the tests
	$(BIN)/pytest $(PARALLEL) tests

test-fast: $(VENV)/.ready  ## those that are not marked slow: nine of ten, in about a minute
	$(BIN)/pytest $(PARALLEL) -q -m "not slow" tests

# $(call libraries,COMMAND,FILES,MORE): the command in each group's environment, where there is one, on its files and more
define libraries
@status=0; $(foreach group,$(GROUPS),if [ -e build/libraries/$(group)/.ready ]; then echo '$(group): $($(group))'; \
	build/libraries/$(group)/bin/$(1) $($(group):%=$(2)) $($(group)_$(3)) $(ARGS) || status=1; fi;) exit $$status
endef

test-libraries: $(GROUPS:%=build/libraries/%/.ready)  ## public libraries, their LSTMs moved over; GROUPS=rl for some of them
	$(call libraries,python -m pytest -q,tests/libraries/test_%.py,tests)

bench-libraries: $(GROUPS:%=build/libraries/%/.ready)  ## the same, timed beside torch's LSTM, into bench/results/libraries
	$(call libraries,python -m bench.libraries,%)

# No dependencies: what is not in the file is not installed, least of all another torch.  torchaudio loses the compiled part
# of its wheel, which needs torch's CUDA libraries to be imported; its Python does without.  Where packages cannot be had, as
# without a network, the group is left out, which is said, and tried again the next time.
build/libraries/%/.ready: tests/libraries/%.txt pyproject.toml setup.py
	@rm -rf $(@D) && $(PYTHON) -m venv $(@D)
	@pip='$(@D)/bin/python -m pip install -q --retries 1 --no-deps'; \
	{ $$pip '$(TORCH)' && $$pip -r $< && rm -f $(@D)/lib/python3*/site-packages/torchaudio/lib/*.so \
	&& $$pip --no-build-isolation -e . && touch $@; } 2>$(@D)/log \
	|| echo "$*: left out, its packages cannot be installed here: $$(grep -m 1 '^ERROR' $(@D)/log || tail -n 1 $(@D)/log)"

gpu:  ## tests, experiments and the quick benchmark on a CUDA GPU, within ten minutes; ARGS="--stage bench", ...
	$(PYTHON) -m bench gpu $(ARGS)

kernels: $(VENV)/.ready build/triton-$(OLD_TRITON)/.ready  ## compile every GPU kernel without a GPU, and report
	$(BIN)/python -m bench kernels --csv out/kernels/newest.csv $(ARGS)
	PYTHONPATH=build/triton-$(OLD_TRITON) $(BIN)/python -m bench kernels --csv out/kernels/$(OLD_TRITON).csv $(ARGS)

build/triton-$(OLD_TRITON)/.ready:
	$(BIN)/python -m pip install -q --no-deps --target $(@D) triton==$(OLD_TRITON)
	touch $@

lint: $(VENV)/.ready build/types  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p lstmcore

docs: site  ## the pages and the API reference, into build/site; links, snippets and examples are tried
	$(BIN)/pytest -q tests/house/test_docs.py tests/house/test_extending.py -k "not command"
	@echo 'the pages: build/site/index.html'

site: $(VENV)/.docs build/types
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# mypy and mkdocstrings find modules by their paths, so they get a tree in which kernels/ lies where it is installed
build/types:
	rm -rf $@
	mkdir -p $@/lstmcore
	ln -s $(filter-out %/__pycache__,$(wildcard $(CURDIR)/lstmcore/*)) $(CURDIR)/kernels $@/lstmcore/

check: $(VENV)/.ready  ## parity with torch.nn.LSTM on this machine
	$(BIN)/python -m lstmcore check

dist: $(VENV)/.release  ## wheel and sdist into dist/, looked into, and tried in a clean environment
	$(BIN)/python -m tests.release dist

matrix: $(VENV)/.release  ## the wheel and its tests on the oldest and newest torch, numba, triton and Python; ARGS="oldest"
	$(BIN)/python -m tests.release matrix $(ARGS)

clean:  ## remove what the other targets made
	rm -rf $(VENV) build dist

$(VENV)/.ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt '$(TORCH)'
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.ready
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	touch $@

$(VENV)/.release: $(VENV)/.ready
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[release]'
	touch $@
