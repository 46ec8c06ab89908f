# Every user action. `make` alone lists them in the order of a competitor's work.

DATA ?= ../shared/data/glacierhack/Train
STORE ?= data/competition
CONFIG ?= train/configs/coarse.yaml
FINISH ?= train/configs/finish.yaml
SCHEME ?= stratified
NAME ?= coarse
RUN ?= runs/$(NAME)-$(SCHEME)
FINAL ?= $(if $(FINISH),$(RUN)-final,$(RUN))
CALIBRATION ?= runs/$(NAME)-calibration.json
WEIGHTS ?= weights/model.pth
SET ?=

VENV := .venv
PY := $(VENV)/bin/python
# One stamp for each version of the requirements: a second run starts at once, a changed file installs again.
READY := $(VENV)/.ready-$(shell cksum requirements.txt | cut -d' ' -f1)
DEMO := data/demo

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint prep fit evaluate calibrate pack train-all baseline report predict check \
	submission clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@echo; echo "  settings: DATA=$(DATA) STORE=$(STORE) CONFIG=$(CONFIG) FINISH=$(FINISH)"
	@echo "            SCHEME=$(SCHEME) NAME=$(NAME) WEIGHTS=$(WEIGHTS) IN= OUT= SET='key=value ...' (of the training configuration)"

setup: $(READY) ## make .venv from requirements.txt (once; 6 GB, some minutes)
$(READY): requirements.txt
	@bash .ci/setup $(VENV)
	@rm -f $(VENV)/.ready-*; touch $@

demo: setup ## the whole kit on synthetic scenes, with the shipped weights: masks, pictures, a small training, the check
	@rm -rf $(DEMO)
	@echo "--- 1 of 4: synthetic Landsat-8 scenes in the competition's layout"
	$(PY) -m prep sample --out $(DEMO)/scenes --tiles 6 --size 256
	@echo "--- 2 of 4: masks with the shipped weights, and a picture of them"
	$(PY) solution.py $(DEMO)/scenes $(DEMO)/masks --weights $(WEIGHTS)
	$(PY) -m train preview --data $(DEMO)/scenes --masks $(DEMO)/masks --out $(DEMO)/preview.png
	@echo "--- 3 of 4: a training in miniature: tile store, five folds, scores, model.pth"
	@$(MAKE) --no-print-directory train-all DATA=$(DEMO)/scenes STORE=$(DEMO)/store CONFIG=train/configs/smoke.yaml \
		FINISH= RUN=$(DEMO)/run CALIBRATION=$(DEMO)/calibration.json WEIGHTS=$(DEMO)/model.pth
	@echo "--- 4 of 4: would the shipped submission be accepted?"
	@$(MAKE) --no-print-directory check
	@echo "done: look at $(DEMO)/preview.png; the miniature training shows the way, its scores mean nothing"

prep: setup ## DATA (Band1 ... Band5 and labels) to the tile store STORE with its folds
	@if [ -f $(STORE)/store.json ]; then echo "$(STORE) is there already (remove it to make it again)"; \
	else $(PY) -m prep competition --data $(DATA) --out $(STORE); fi

fit: prep ## train the five folds of SCHEME in two phases (CONFIG, FINISH); continues where it was interrupted
	$(PY) -m train fit --config $(CONFIG) --run $(RUN) data.store=$(STORE) data.scheme=$(SCHEME) $(SET)
	$(if $(FINISH),$(PY) -m train fit --config $(FINISH) --run $(FINAL) \
		data.store=$(STORE) data.scheme=$(SCHEME) model.init=$(RUN) $(SET))

evaluate: fit ## predict and score each tile with the fold that never saw it
	$(PY) -m train evaluate --run $(FINAL) --store $(STORE)

calibrate: evaluate ## decide by out-of-fold MCC which steps follow the networks
	$(PY) -m train calibrate $(FINAL) --store $(STORE) --out $(CALIBRATION)

train-all: calibrate ## all of the above, and WEIGHTS from it
	$(PY) -m train pack --run $(FINAL) --calibration $(CALIBRATION) --out $(WEIGHTS)

baseline: prep ## the per-pixel gradient boosting on the same folds
	$(PY) -m train baseline --scheme $(SCHEME) --run runs/baseline-$(SCHEME) --store $(STORE)

report: setup ## compare U-Net and baseline on both kinds of folds, and write reports/
	@for scheme in stratified spatial; do \
		$(MAKE) --no-print-directory evaluate baseline SCHEME=$$scheme || exit 1; done
	$(PY) -m train calibrate runs/$(NAME)-stratified-final runs/$(NAME)-spatial-final --store $(STORE) \
		--out $(CALIBRATION) --report reports/postprocess.md
	$(PY) -m train report U-Net=runs/$(NAME)-stratified-final baseline=runs/baseline-stratified \
		U-Net-spatial=runs/$(NAME)-spatial-final baseline-spatial=runs/baseline-spatial \
		--store $(STORE) --made-with "make report DATA=<folder with Band1 ... Band5 and the labels>"

predict: setup ## masks for the tiles in IN, into OUT
	@test -n "$(IN)" -a -n "$(OUT)" || { echo "make predict IN=<folder with Band1 ... Band5> OUT=<folder>"; exit 2; }
	$(PY) solution.py $(IN) $(OUT) --weights $(WEIGHTS)

check: setup ## would the submission be accepted? every caller, every file, in an empty folder
	$(PY) -m train check --weights $(WEIGHTS)

submission: setup ## check, then dist/submission.zip; OVERWRITE=yes replaces an older one
	$(PY) -m train submission --weights $(WEIGHTS) $(if $(OVERWRITE),--overwrite)

test: setup ## the test suite
	$(PY) -m pytest

lint: setup ## ruff
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean: ## remove the demo, caches and reports of tests; keeps .venv, stores and runs
	rm -rf $(DEMO) .pytest_cache .ruff_cache
