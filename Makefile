# `make help` lists the targets. Variables:
#   CONFIG  config: a name in configs/ or a path                      (quickstart.yaml)
#   SET     overrides, separated by spaces: SET="a.b=c d.e=f"         (none)
#   SHARDS  number of processes of `make mine-shards`                 (4)
#   PYTHON  Python 3.11 or newer to create .venv                      (python3)
# SET does not support values with spaces: run .venv/bin/negpipe VERB CONFIG --set 'a.b=c d' instead.
# When negpipe fails, make prints its exit code ("Error 3") but exits with 2: schedulers that distinguish
# exit codes must call .venv/bin/negpipe.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
CONFIG ?= quickstart.yaml
SET ?=
SHARDS ?= 4

BIN := .venv/bin
# Markers of what is installed: packages for mining, for training, everything.
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

setup: $(READY)  ## create .venv with all packages, in the versions of constraints.txt

$(MINING): pyproject.toml constraints.txt
	@echo "Setting up .venv (about 2 GB); the first time takes minutes, and pip prints nothing meanwhile."
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(PIP) -e '.[offline]'
	@touch $@

# By name: negpipe is already installed and is not rebuilt; only missing packages of its extras are fetched.
$(TRAINING): $(MINING)
	@$(PIP) 'negpipe[train]'
	@touch $@

$(READY): $(MINING)
	@echo "Installing all packages, those for tests and docs included."
	@$(PIP) 'negpipe[train,http,onnx,openvino,ray,slurm,s3,docs,dev]'
	@touch $(TRAINING) $@

$(QUICKSTART): | $(MINING)
	@$(BIN)/python -m negpipe.quickstart $@

mine:      ## run every stage that is not up to date, and write the report (default: the quickstart)
ingest:    ## run one stage: sources to corpus, anchors, positives
encode:    ## run one stage: texts to embeddings
index:     ## run one stage: embeddings to a FAISS index
search:    ## run one stage: candidates of every anchor
triplets:  ## run one stage: candidates to training rows
plan:      ## show what a run would do and cost, without running it
status:    ## show the state of every stage
verify:    ## check every file against its digest
clean:     ## delete superseded parts, after confirmation
audit:     ## check every training row against the qrels
calibrate: ## measure how many hidden positives each setting takes as negatives
quality:   ## show recall, MRR, nDCG and MAP of the encoder
report:    ## write report.html
train:     ## fine-tune the encoder on the rows, and show whether it helped (requires a section train)
ablate:    ## train with several settings, and compare the models (default: the quickstart, under ten minutes)

ablate: CONFIG := $(if $(filter quickstart.yaml,$(CONFIG)),ablate.yaml,$(CONFIG))

train ablate: $(TRAINING)
$(VERBS): $(MINING)
	@$(BIN)/negpipe $@ '$(CONFIG)' $(OVERRIDES)

# The same as on a cluster (configs/cluster), on one machine. commit lists parts missing after failed shards.
mine-shards: $(MINING)  ## run every stage as SHARDS parallel processes, and commit it
	@$(BIN)/negpipe ingest '$(CONFIG)' $(OVERRIDES)
	@set -e; cpus=$$(( ($$(nproc) + $(SHARDS) - 1) / $(SHARDS) )); \
	for stage in encode index slices search triplets; do \
		for shard in $$(seq 0 $$(( $(SHARDS) - 1 ))); do \
			$(BIN)/negpipe work $$stage '$(CONFIG)' --shard $$shard/$(SHARDS) --set resources.cpus=$$cpus $(OVERRIDES) & \
		done; \
		wait; \
		$(BIN)/negpipe commit $$stage '$(CONFIG)' --shards $(SHARDS) $(OVERRIDES); \
	done

# Stages that read the source; configs other than the default provide their own.
ifneq ($(filter $(CONFIG),quickstart quickstart.yaml configs/quickstart.yaml),)
mine ingest ablate mine-shards: | $(QUICKSTART)
endif

wheel: $(READY)  ## build sdist and wheel into dist/
	@$(BIN)/python scripts/build_wheel.py dist

test: check  ## required before a commit: check, then all tests except the slow ones
	$(BIN)/pytest -m 'not slow' -n auto --dist worksteal

test-fast: $(READY)  ## tests of rules, tables, encoders and the store only, within a minute
	$(BIN)/pytest -m 'not slow' -n auto --dist worksteal $(FAST)

test-loaders: $(READY)  ## test exports with the trainers' code, fetched into .loaders without its dependencies
	@test -d .loaders || $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .loaders $(LOADERS)
	PYTHONPATH=$(CURDIR)/.loaders $(BIN)/pytest -m slow tests/rows/test_real_loaders.py

test-slow: $(READY)  ## slow tests: kills, damage, rivals, memory, the drop-in, the page in a browser
	$(BIN)/pytest -m 'slow and not cluster' -n auto --dist worksteal
	$(BIN)/pytest -m 'slow and cluster'

torture: $(READY)  ## full-size tests of kills, damage, rivals and random histories, one to two hours; print counts
	$(BIN)/pytest --torture -m torture -n auto --dist worksteal

check: $(READY)  ## run ruff, mypy and import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)  ## build the documentation into site/, for offline use; broken links are errors
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(READY)  ## sort imports, apply ruff fixes, format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
