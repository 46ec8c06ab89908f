# Every user action. `make` alone lists them in the order of a competitor's work. Upkeep of the kit: .ci/tasks.mk

DATA ?= ../shared/data/glacierhack/Train
STORE ?= data/competition
RECIPE ?= train/recipe.yaml
SCHEME ?=
NAME ?= $(basename $(notdir $(RECIPE)))$(if $(SCHEME),-$(SCHEME))
RUN ?= runs/$(NAME)
WEIGHTS ?= weights/model.pth
JOBS ?= 2
SET ?=
HKH ?= data/hkh
PRETRAINED ?=

# Fine-tuning starts from the weights and the statistics of pretraining.
SETTINGS = data.store="$(STORE)" $(if $(SCHEME),data.scheme=$(SCHEME)) \
	$(if $(PRETRAINED),model.imagenet=false model.pretrained="$(PRETRAINED)") \
	$(if $(DEVICES),trainer.devices=$(DEVICES)) $(SET)
OF_RUN = --recipe "$(RECIPE)" --run "$(RUN)"

VENV := .venv
PY := $(VENV)/bin/python
# What it refuses is then told in the variables of this file.
TRAIN := CALLED_BY_MAKE=yes $(PY) -m train
# One stamp for each version of the requirements, whatever the files' times: a second run starts at once, a changed file
# installs again.
READY := $(VENV)/.ready-$(shell cat requirements.txt requirements.lock | cksum | cut -d' ' -f1)
DEMO := data/demo

.DEFAULT_GOAL := help
.PHONY: help setup demo predict preview evaluate export map prep fit score train-all checklist check grader-check bench submission \
	baseline distil pretrain report compare test lint clean

help:
	@awk -F ':.*## ' '/^##@ / {printf "\n%s\n", substr($$0, 5)} \
		/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile
	@echo; echo "Arguments: make TARGET NAME=value ..., now:"
	@echo "  DATA=$(DATA)  your tiles: Band1 ... Band5, label"
	@echo "  STORE=$(STORE) RECIPE=$(RECIPE) RUN=$(RUN) WEIGHTS=$(WEIGHTS) JOBS=$(JOBS)"
	@echo "  SCHEME=stratified or spatial; IN= OUT= MASKS= LABELS= folders; SET='train.epochs=6 optim.lr=3e-4' settings"

##@ First minutes

setup: $(READY) ## make .venv from requirements.lock (once; 6 GB, some minutes)
$(READY):
	@bash .ci/setup $(VENV)
	@rm -f $(VENV)/.ready-*; touch $@

demo: setup ## the whole kit on synthetic scenes, with the shipped weights: masks, pictures, a small training, the check
	@rm -rf $(DEMO)
	@echo "--- 1 of 4: synthetic Landsat-8 scenes in the competition's layout"
	$(PY) -m prep sample --out $(DEMO)/scenes --tiles 6 --size 256
	@echo "--- 2 of 4: masks with the shipped weights, and a picture of them"
	$(PY) solution.py $(DEMO)/scenes $(DEMO)/masks --weights $(WEIGHTS)
	$(TRAIN) preview --data $(DEMO)/scenes --masks $(DEMO)/masks --out $(DEMO)/preview.png
	@echo "--- 3 of 4: a training in miniature: tile store, five folds, scores, model.pth"
	@$(MAKE) --no-print-directory train-all DATA=$(DEMO)/scenes STORE=$(DEMO)/store RECIPE=train/recipes/smoke.yaml \
		RUN=$(DEMO)/run WEIGHTS=$(DEMO)/model.pth
	@echo "--- 4 of 4: would the shipped submission be accepted?"
	@$(MAKE) --no-print-directory check
	@echo "done: look at $(DEMO)/preview.png; the miniature training shows the way, its scores mean nothing"

##@ Your tiles: look, segment, score, use elsewhere

predict: setup ## masks for the tiles in IN, into OUT, with all passes
	@test -n "$(IN)" -a -n "$(OUT)" || { echo "make predict IN=<folder with Band1 ... Band5> OUT=<folder>"; exit 2; }
	$(PY) "$(or $(wildcard $(dir $(WEIGHTS))solution.py),solution.py)" "$(IN)" "$(OUT)" --weights "$(WEIGHTS)" --time-budget inf

preview: setup ## pictures of the tiles in IN into OUT: image, outlines, areas; of MASKS, else by WEIGHTS; LABELS= beside
	@test -n "$(IN)" -a -n "$(OUT)" || { echo "make preview IN=<folder with Band1 ... Band5> OUT=<folder>"; exit 2; }
	$(TRAIN) preview --data "$(IN)" --out "$(OUT)" $(if $(MASKS),--masks "$(MASKS)",--weights "$(WEIGHTS)") \
		$(if $(LABELS),--labels "$(LABELS)")

evaluate: setup ## score the masks in MASKS, of any origin, against LABELS of either phase; IN= bands: without nodata too
	@test -n "$(MASKS)" -a -n "$(LABELS)" || { echo "make evaluate MASKS=<folder> LABELS=<folder> [IN=<Band1 ... Band5>]"; exit 2; }
	$(TRAIN) evaluate --pred "$(MASKS)" --labels "$(LABELS)" $(if $(IN),--data "$(IN)") --weights "$(WEIGHTS)"

export: setup ## the masks in MASKS as GeoTIFF and polygons for QGIS, into OUT; IN holds their bands
	@test -n "$(IN)" -a -n "$(OUT)" -a -n "$(MASKS)" || \
		{ echo "make export IN=<folder with Band1 ... Band5> MASKS=<folder of masks> OUT=<folder>"; exit 2; }
	$(TRAIN) export --masks "$(MASKS)" --data "$(IN)" --out "$(OUT)"

map: setup ## a Landsat 8/9 scene SCENE (folder or tar as USGS delivers it) to a glacier map in OUT
	@test -n "$(SCENE)" -a -n "$(OUT)" || { echo "make map SCENE=<LC08_L2SP_... folder or tar> OUT=<folder> [AOI=<outline>]"; exit 2; }
	$(TRAIN) map "$(SCENE)" --out "$(OUT)" --weights "$(WEIGHTS)" $(if $(AOI),--aoi "$(AOI)")

##@ Train on your tiles: each does what it needs before

prep: setup ## DATA (Band1 ... Band5 and labels) to the tile store STORE with its folds
	$(PY) -m prep competition --data "$(DATA)" --out "$(STORE)"

fit: prep ## train the networks of RECIPE, JOBS at once; continues where it was interrupted
	$(TRAIN) fit $(OF_RUN) --jobs $(JOBS) $(SETTINGS)

score: fit ## predict and score each tile with the networks that never saw it
	$(TRAIN) score $(OF_RUN) $(SETTINGS)

train-all: score ## all of the above, and WEIGHTS from it; an older file is kept as <name>.previous.pth
	$(TRAIN) pack $(OF_RUN) --out "$(WEIGHTS)" $(SETTINGS)

##@ Submit

checklist: setup ## are the stores HKH and STORE, RECIPE, PRETRAINED and WEIGHTS as they should be? a line each
	$(TRAIN) checklist --hkh "$(HKH)" --store "$(STORE)" --recipe "$(RECIPE)" --weights "$(WEIGHTS)" \
		$(if $(PRETRAINED),--pretrained "$(PRETRAINED)")

check: setup ## would the submission be accepted? every caller, every file, in an empty folder
	$(TRAIN) check --weights "$(WEIGHTS)"

grader-check: setup ## the same in the grader's Python 3.9, read-only and offline; builds it once in ~/.cache (4 GB); IN= tiles
	$(TRAIN) grader-check --weights "$(WEIGHTS)" $(if $(IN),--data "$(IN)") $(if $(OPTIONAL),--optional)

bench: setup ## how fast is solution.py, where does its time go, how much memory
	$(TRAIN) bench --weights "$(WEIGHTS)" $(if $(IN),--data "$(IN)")

submission: setup ## check, then dist/submission.zip; OVERWRITE=yes replaces an older one, FORCE=yes writes it though the time limit failed
	$(TRAIN) submission --weights "$(WEIGHTS)" $(if $(OVERWRITE),--overwrite) $(if $(FORCE),--force)

##@ Compare, improve, pretrain

baseline: prep ## the per-pixel gradient boosting on the same folds
	$(TRAIN) baseline --run runs/baseline$(if $(SCHEME),-$(SCHEME)) --store "$(STORE)" $(if $(SCHEME),--scheme $(SCHEME))

distil: setup ## one network taught by the run TEACHER, into runs/student
	@test -n "$(TEACHER)" || { echo "make distil TEACHER=<run, e.g. runs/recipe>"; exit 2; }
	$(TRAIN) distil --recipe train/recipes/distil.yaml --run runs/student --teacher "$(TEACHER)" $(SETTINGS)

pretrain: setup ## train on the HKH store HKH less the ground of STORE; then train-all with PRETRAINED= (docs/hkh.md)
	@test -f "$(HKH)/store.json" || { echo "$(HKH) is no tile store; make it with python -m prep hkh (docs/hkh.md)"; exit 2; }
	$(TRAIN) fit --recipe train/recipes/pretrain.yaml --run runs/pretrain --folds 0 --member unet data.store="$(HKH)" \
		$(if $(shell test -f "$(STORE)/store.json" && echo yes),data.exclude_ground="$(STORE)") $(SET)

report: setup ## tables and a page (reports/local/) on RUNS='name=runs/a name=runs/b'
	@test -n "$(RUNS)" || { echo "make report RUNS='mine=runs/recipe baseline=runs/baseline'"; exit 2; }
	$(TRAIN) report $(RUNS) --store "$(STORE)" --out reports/local/report.md --html reports/local/index.html

compare: setup ## do the runs A and B differ? score differences with their intervals
	@test -n "$(A)" -a -n "$(B)" || { echo "make compare A=runs/a B=runs/b"; exit 2; }
	$(TRAIN) compare "$(A)" "$(B)" --store "$(STORE)"

##@ The kit itself

test: setup ## the tests, on all cores (PARTS=tests/x: some; SLOW=yes: the slow ones)
	$(PY) -m pytest -n auto --dist loadfile -m "$(if $(SLOW),slow,not slow)" $(PARTS)

lint: setup ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean: ## remove the demo, caches and reports of tests; keeps .venv, stores and runs
	rm -rf $(DEMO) .pytest_cache .ruff_cache .mypy_cache
