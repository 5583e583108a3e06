# `make help` lists the targets. Variables:
#   CONFIG  a config: a name in configs/ or a path                    (quickstart.yaml)
#   SET     overrides, separated by spaces: SET="a.b=c d.e=f"         (none)
#   SHARDS  processes of `make mine-shards`                          (4)
#   PYTHON  the Python 3.11 or newer that makes .venv                 (python3)
# A value with a space in it does not fit into SET: call .venv/bin/negpipe VERB CONFIG --set 'a.b=c d' instead.
# When negpipe fails, make prints its exit code ("Error 3") but itself ends with 2: schedulers that tell the
# codes apart call .venv/bin/negpipe.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
CONFIG ?= quickstart.yaml
SET ?=
SHARDS ?= 4

BIN := .venv/bin
# What is installed so far: what mining needs, what training needs, everything.
MINING := .venv/.ready-mining
TRAINING := .venv/.ready-training
READY := .venv/.ready
PIP = $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
VERBS := mine ingest encode index search triplets plan status verify clean audit calibrate quality report train ablate
QUICKSTART := data/quickstart
OVERRIDES = $(foreach pair,$(SET),--set '$(pair)')
LOADERS := pylate==1.6.0 nemo-automodel==0.7.0 ms-swift==4.6.0 modelscope modelscope-hub addict attrdict dacite \
	json-repair binpacking trl cryptography cffi pycparser einops attrs aiohttp multidict yarl frozenlist propcache \
	aiosignal aiohappyeyeballs simplejson
FAST := $(addprefix tests/,config data encoders select store)

.PHONY: help setup docs $(VERBS) mine-shards wheel test test-fast test-slow test-loaders torture check format

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo 'Options: CONFIG=scifact.yaml (a name in configs/ or a path), SET="key=value key=value", PYTHON=python3.11'

setup: $(READY)  ## make .venv with everything, in the versions of constraints.txt

$(MINING): pyproject.toml constraints.txt
	@echo "Setting up .venv; the first time takes minutes."
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(PIP) -e '.[offline]'
	@touch $@

# By name: negpipe is installed already and is not built again, only what its extras lack is fetched.
$(TRAINING): $(MINING)
	@$(PIP) 'negpipe[train]'
	@touch $@

$(READY): $(MINING)
	@echo "Installing what tests need."
	@$(PIP) 'negpipe[train,http,onnx,openvino,ray,slurm,s3,docs,dev]'
	@touch $(TRAINING) $@

$(QUICKSTART): | $(MINING)
	@$(BIN)/python -m negpipe.quickstart $@

mine:      ## run every stage that is not done, and report (default: the quickstart)
ingest:    ## run one stage: sources to corpus, anchors, positives
encode:    ## run one stage: texts to embeddings
index:     ## run one stage: embeddings to a FAISS index
search:    ## run one stage: candidates of every anchor
triplets:  ## run one stage: candidates to training rows
plan:      ## say what a run would do and cost, without running
status:    ## show which stages are done
verify:    ## read every file again and compare its digest
clean:     ## remove superseded parts, after asking
audit:     ## check every training row against the qrels
calibrate: ## measure how many hidden positives each setting takes as negatives
quality:   ## recall, MRR, nDCG and MAP of the encoder
report:    ## write report.html
train:     ## fine-tune the encoder on the rows, and say whether it helped (a config with a section train)
ablate:    ## train with several settings, and compare the models (default: the quickstart, under ten minutes)

ablate: CONFIG := $(if $(filter quickstart.yaml,$(CONFIG)),ablate.yaml,$(CONFIG))

train ablate: $(TRAINING)
$(VERBS): $(MINING)
	@$(BIN)/negpipe $@ '$(CONFIG)' $(OVERRIDES)

# What a cluster does (configs/cluster), on one machine. commit names what shards that failed have left.
mine-shards: $(MINING)  ## run every stage as SHARDS processes side by side, and commit it
	@$(BIN)/negpipe ingest '$(CONFIG)' $(OVERRIDES)
	@set -e; cpus=$$(( ($$(nproc) + $(SHARDS) - 1) / $(SHARDS) )); \
	for stage in encode index search triplets; do \
		for shard in $$(seq 0 $$(( $(SHARDS) - 1 ))); do \
			$(BIN)/negpipe work $$stage '$(CONFIG)' --shard $$shard/$(SHARDS) --set resources.cpus=$$cpus $(OVERRIDES) & \
		done; \
		wait; \
		$(BIN)/negpipe commit $$stage '$(CONFIG)' --shards $(SHARDS) $(OVERRIDES); \
	done

# The stages that read sources; any config but the default brings its own.
ifneq ($(filter $(CONFIG),quickstart quickstart.yaml configs/quickstart.yaml),)
mine ingest ablate mine-shards: | $(QUICKSTART)
endif

wheel: $(READY)  ## build sdist and wheel into dist/
	@$(BIN)/python scripts/build_wheel.py dist

test: check  ## what has to pass before a commit: check, then all tests but the slow ones
	$(BIN)/pytest -m 'not slow' -n auto --dist worksteal

test-fast: $(READY)  ## the tests of rules, tables, encoders and the store alone, within a minute
	$(BIN)/pytest -m 'not slow' -n auto --dist worksteal $(FAST)

test-loaders: $(READY)  ## exports through the trainers' own code, which is fetched into .loaders without what it requires
	@test -d .loaders || $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .loaders $(LOADERS)
	PYTHONPATH=$(CURDIR)/.loaders $(BIN)/pytest -m slow tests/rows/test_real_loaders.py

test-slow: $(READY)  ## the slow tests: kills, damage, rivals, memory, the drop-in, the page in a browser
	$(BIN)/pytest -m 'slow and not cluster' -n auto --dist worksteal
	$(BIN)/pytest -m 'slow and cluster'

torture: $(READY)  ## kills, damage, rivals and random histories at full size, 40 to 60 minutes; prints counts
	$(BIN)/pytest --torture -m torture -n auto --dist worksteal

check: $(READY)  ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)  ## build the documentation into site/, which is read without a network; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(READY)  ## sort imports, fix what ruff can fix, format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
