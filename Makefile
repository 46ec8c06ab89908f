# Every user action. `make` alone lists them in the order of a competitor's work.

DATA ?= ../shared/data/glacierhack/Train
STORE ?= data/competition
MODEL ?= imagenet
CONFIG ?= train/configs/$(MODEL).yaml
SCHEME ?= stratified
HKH ?= data/hkh
PRETRAINED ?=
NAME ?= $(if $(PRETRAINED),pretrained,$(MODEL))
RUN ?= runs/$(NAME)-$(SCHEME)
CALIBRATION ?= runs/$(NAME)-calibration.json
PASSES ?= runs/$(NAME)-passes.json
WEIGHTS ?= weights/model.pth
SET ?=
SEED ?= 0
ONLY ?=
TEACHERS ?= $(UNETS:%=runs/%-$(SCHEME)) $(PIXEL_SEEDS:%=runs/pixels%-$(SCHEME))
STUDENT ?= runs/student-$(SCHEME)
RUNS ?=
MAX_MB ?= 300
MAX_GMAC ?= 160
NETWORKS ?=
UNETS ?= imagenet0 directional0 fine0
PIXEL_SEEDS ?= 0 1 2
OOF ?=
MODELS ?=
FRONTIER ?= reports/frontier.md
ABLATIONS ?= train/configs/ablations.yaml
SEEDS ?= 0,1
STEPS ?=
JOBS ?=
DEVICES ?=
PRETRAIN_RUN ?= runs/hkh-pretrain
HKH_WEIGHTS ?= weights/hkh_pretrained.ckpt
# Fine-tuning: the weights and the statistics of pretraining, at a low learning rate.
FINETUNE := $(if $(PRETRAINED),model.imagenet=false model.pretrained=$(PRETRAINED) optim.lr=5e-5)

ON := $(if $(DEVICES),trainer.devices=$(DEVICES))

VENV := .venv
PY := $(VENV)/bin/python
# One stamp for each version of the requirements: a second run starts at once, a changed file installs again.
READY := $(VENV)/.ready-$(shell cat requirements.txt requirements.lock | cksum | cut -d' ' -f1)
# Side by side, a process for each usable core; tests of one file share what they set up, so they stay together.
PYTEST := $(PY) -m pytest -n auto --dist loadfile
PARTS ?=
DEMO := data/demo

.DEFAULT_GOAL := help
.PHONY: help \
	setup demo \
	predict preview score export \
	prep fit evaluate calibrate pareto train-all \
	check grader-check bench submission \
	baseline pixels unets pairs train-mixed report ablate distill mix frontier pretrain bench-prep \
	test test-slow lint coverage fuzz audit reference lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^##@ / {printf "\n%s\n", substr($$0, 5)} \
		/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile
	@echo; echo "Arguments: make TARGET NAME=value ..., now:"
	@echo "  DATA=$(DATA)  your tiles: Band1 ... Band5, label"
	@echo "  STORE=$(STORE) MODEL=$(MODEL) CONFIG=$(CONFIG) SCHEME=$(SCHEME) NAME=$(NAME) WEIGHTS=$(WEIGHTS)"
	@echo "  IN= OUT= MASKS= LABELS=  folders; DEVICES=$(DEVICES) GPUs of a training; JOBS=$(JOBS) folds at once"
	@echo "  SET='key=value ...'  of the training configuration, e.g. SET='train.epochs=20 optim.lr=3e-4'"

##@ First minutes

setup: $(READY) ## make .venv from requirements.txt (once; 6 GB, some minutes)
$(READY): requirements.txt requirements.lock
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
		RUN=$(DEMO)/run CALIBRATION=$(DEMO)/calibration.json PASSES=$(DEMO)/passes.json WEIGHTS=$(DEMO)/model.pth
	@echo "--- 4 of 4: would the shipped submission be accepted?"
	@$(MAKE) --no-print-directory check
	@echo "done: look at $(DEMO)/preview.png; the miniature training shows the way, its scores mean nothing"

##@ Your tiles: look, segment, score, use elsewhere

predict: setup ## masks for the tiles in IN, into OUT
	@test -n "$(IN)" -a -n "$(OUT)" || { echo "make predict IN=<folder with Band1 ... Band5> OUT=<folder>"; exit 2; }
	$(PY) solution.py $(IN) $(OUT) --weights $(WEIGHTS)

preview: setup ## pictures of the tiles in IN into OUT: image, outlines, areas; of the masks in MASKS, else by WEIGHTS
	@test -n "$(IN)" -a -n "$(OUT)" || { echo "make preview IN=<folder with Band1 ... Band5> OUT=<folder>"; exit 2; }
	$(PY) -m train preview --data $(IN) --out $(OUT) $(if $(MASKS),--masks $(MASKS),--weights $(WEIGHTS))

score: setup ## score the masks in MASKS, of any origin, against LABELS of either phase; IN= bands: without nodata too
	@test -n "$(MASKS)" -a -n "$(LABELS)" || { echo "make score MASKS=<folder> LABELS=<folder> [IN=<Band1 ... Band5>] [TILES=02_07,03_11] [JSON=<file>]"; exit 2; }
	$(PY) -m train evaluate --pred $(MASKS) --labels $(LABELS) $(if $(IN),--data $(IN)) $(if $(TILES),--tiles $(TILES)) $(if $(JSON),--json $(JSON))

export: setup ## the masks in MASKS as GeoTIFF and polygons for QGIS, into OUT; IN holds their bands
	@test -n "$(IN)" -a -n "$(OUT)" -a -n "$(MASKS)" || \
		{ echo "make export IN=<folder with Band1 ... Band5> MASKS=<folder of masks> OUT=<folder>"; exit 2; }
	$(PY) -m train export --masks $(MASKS) --data $(IN) --out $(OUT)

##@ Train on your tiles: each does what it needs before

prep: setup ## DATA (Band1 ... Band5 and labels) to the tile store STORE with its folds
	@if [ -f $(STORE)/store.json ]; then echo "$(STORE) is there already (remove it to make it again)"; \
	elif ! test -d "$(DATA)"; then echo "DATA=$(DATA) is no folder; make $(firstword $(MAKECMDGOALS)) DATA=<folder with Band1 ... Band5 and label>; without tiles: make demo"; exit 2; \
	else $(PY) -m prep competition --data $(DATA) --out $(STORE); fi

fit: prep ## train the five folds of SCHEME as CONFIG says, JOBS at once; continues where it was interrupted
	$(PY) -m train fit --config $(CONFIG) --run $(RUN) $(if $(JOBS),--jobs $(JOBS)) data.store=$(STORE) data.scheme=$(SCHEME) $(FINETUNE) $(ON) $(SET)

evaluate: fit ## predict and score each tile with the fold that never saw it
	$(PY) -m train evaluate --run $(RUN) --store $(STORE)

calibrate: evaluate ## decide by out-of-fold MCC which steps follow the networks
	$(PY) -m train calibrate $(RUN) --store $(STORE) --out $(CALIBRATION)

pareto: calibrate ## order the passes by what each is worth out of fold
	$(PY) -m train pareto $(RUN) --store $(STORE) --out $(PASSES)

train-all: pareto ## all of the above, and WEIGHTS from it
	$(PY) -m train pack --run $(RUN) --calibration $(CALIBRATION) --passes $(PASSES) --out $(WEIGHTS)

##@ Submit

check: setup ## would the submission be accepted? every caller, every file, in an empty folder
	$(PY) -m train check --weights $(WEIGHTS)

grader-check: setup ## the same in the grader's Python 3.9, read-only and offline; builds it once in ~/.cache (4 GB); IN= tiles
	$(PY) -m train grader-check --weights $(WEIGHTS) $(if $(IN),--data $(IN)) $(if $(OPTIONAL),--optional)

bench: setup ## how fast is solution.py, where does its time go, how much memory: reports/bench.md
	$(PY) -m train bench --weights $(WEIGHTS)

submission: setup ## check, then dist/submission.zip; OVERWRITE=yes replaces an older one
	$(PY) -m train submission --weights $(WEIGHTS) $(if $(OVERWRITE),--overwrite)

##@ Compare, improve, pretrain

baseline: prep ## the per-pixel gradient boosting on the same folds
	$(PY) -m train baseline --scheme $(SCHEME) --run runs/baseline-$(SCHEME) --store $(STORE)

pixels: prep ## the network on single pixels, on the same folds, once with each of PIXEL_SEEDS
	@for seed in $(PIXEL_SEEDS); do run=runs/pixels$$seed-$(SCHEME); \
		$(PY) -m train pixels --run $$run store=$(STORE) scheme=$(SCHEME) seed=$$seed && \
		$(PY) -m train evaluate --run $$run --store $(STORE) || exit 1; done

unets: prep ## the U-Nets UNETS, <config><seed>, on the same folds and once on all tiles; JOBS folds at once (default 2)
	@for unet in $(UNETS); do kind=$$(echo $$unet | sed 's/-*[0-9]*$$//'); seed=$$(echo $$unet | sed 's/.*[^0-9]//'); \
		run=runs/$$unet-$(SCHEME); \
		given="--config train/configs/$$kind.yaml --run $$run data.store=$(STORE) data.scheme=$(SCHEME) train.seed=$$seed"; \
		$(PY) -m train fit $$given --jobs $(or $(JOBS),2) && $(PY) -m train fit $$given --all-tiles && \
		$(PY) -m train evaluate --run $$run --store $(STORE) || exit 1; done

pairs: prep ## teachers that saw neither the tiles of a student's fold nor those of another: a U-Net and one on pixels
	$(PY) -m train fit --config train/configs/directional.yaml --run runs/directional0-$(SCHEME)-pairs --pairs \
		--jobs $(or $(JOBS),2) data.store=$(STORE) data.scheme=$(SCHEME) train.epochs=4
	$(PY) -m train pixels --run runs/pixels0-$(SCHEME)-pairs --pairs store=$(STORE) scheme=$(SCHEME)

train-mixed: unets pixels ## how the shipped WEIGHTS are made (SCHEME=spatial): U-Nets and networks on pixels, weighed
	@$(MAKE) --no-print-directory mix MAX_MB=70 CALIBRATION= OOF=runs/mixed-$(SCHEME) \
		RUNS="$(UNETS:%=runs/%-$(SCHEME)) $(PIXEL_SEEDS:%=runs/pixels%-$(SCHEME))"

report: setup ## compare U-Net and baseline on both kinds of folds: reports/, and reports/index.html with all tiles
	@for scheme in stratified spatial; do \
		$(MAKE) --no-print-directory evaluate baseline SCHEME=$$scheme || exit 1; done
	$(PY) -m train calibrate runs/$(NAME)-stratified runs/$(NAME)-spatial --store $(STORE) \
		--out $(CALIBRATION) --report reports/postprocess.md
	$(PY) -m train pareto runs/$(NAME)-stratified runs/$(NAME)-spatial --store $(STORE) \
		--baseline runs/baseline-stratified --out $(PASSES) --report reports/pareto.md
	$(PY) -m train report U-Net=runs/$(NAME)-stratified baseline=runs/baseline-stratified \
		U-Net-spatial=runs/$(NAME)-spatial baseline-spatial=runs/baseline-spatial \
		--store $(STORE) --html reports/index.html --calibration $(CALIBRATION) --passes $(PASSES) \
		--made-with "make report DATA=<folder with Band1 ... Band5 and the labels>"

ablate: prep ## train the trials of ABLATIONS side by side and tabulate what each is worth: reports/ablations.md
	$(PY) -m train ablate --set $(ABLATIONS) --run runs/ablate --report reports/ablations.md --store $(STORE) \
		--seeds $(SEEDS) $(if $(STEPS),--steps $(STEPS)) $(if $(JOBS),--jobs $(JOBS)) $(if $(SET),--override $(SET))

distill: setup ## students of the runs TEACHERS, fold by fold and of all tiles, into STUDENT, and their scores; SET= changes the student
	@for which in "" --all-tiles; do \
		$(PY) -m train distil --config train/configs/distil.yaml --run $(STUDENT) $$which \
			$(foreach run,$(TEACHERS),--teacher $(run)) data.store=$(STORE) data.scheme=$(SCHEME) $(SET) || exit 1; done
	$(PY) -m train evaluate --run $(STUDENT) --store $(STORE)

mix: setup ## WEIGHTS of the evaluated runs RUNS, weighed against each other, within MAX_MB and MAX_GMAC
	@test -n "$(RUNS)" || { echo "make mix RUNS='runs/a runs/b' [MAX_MB=300] [MAX_GMAC=160] [WEIGHTS=...]"; exit 2; }
	$(PY) -m train pack $(foreach run,$(RUNS),--run $(run)) --store $(STORE) --max-mb $(MAX_MB) --max-gmac $(MAX_GMAC) \
		$(if $(NETWORKS),--networks $(NETWORKS)) $(if $(OOF),--oof $(OOF)) $(if $(wildcard $(CALIBRATION)),--calibration $(CALIBRATION)) --out $(WEIGHTS)

frontier: setup ## score against work of MODELS='teacher=runs/a student=runs/b both=runs/a,runs/b': reports/frontier.md
	@test -n "$(MODELS)" || { echo "make frontier MODELS='teacher=runs/a student=runs/b both=runs/a,runs/b'"; exit 2; }
	$(PY) -m train pareto $(MODELS) --store $(STORE) --out $(FRONTIER:.md=.json) --report $(FRONTIER)

pretrain: setup ## train on the HKH store HKH, into weights/hkh_pretrained.ckpt; then make train-all PRETRAINED=<that file>
	@test -f $(HKH)/store.json || { echo "$(HKH) is no tile store; make it with python -m prep hkh (docs/hkh.md)"; exit 2; }
	$(PY) -m train fit --config train/configs/pretrain.yaml --run $(PRETRAIN_RUN) data.store=$(HKH) $(ON) $(SET)
	cp $(PRETRAIN_RUN)/fold0/fold.pt $(HKH_WEIGHTS).partial && mv $(HKH_WEIGHTS).partial $(HKH_WEIGHTS)

bench-prep: setup ## megapixels a second of python -m prep hkh beside a bare read and write: reports/prep_hkh.md
	$(PY) -m prep bench

##@ The kit itself

test: setup ## the tests, on all cores, without the slow ones (PARTS=tests/x: some)
	$(PYTEST) -m "not slow" $(PARTS)

test-slow: setup ## the slow tests: kills, whole programs, long searches
	$(PYTEST) -m slow $(PARTS)

lint: setup ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

coverage: setup ## the lines that the tests run, file by file: docs/testing.md says what the others are for (PARTS= some tests)
	$(PY) .ci/coverage_table.py $(PARTS)

fuzz: setup ## search for what breaks solution.py, prep and training: hostile tiles, kills, many tiles (half an hour)
	PYTHONPATH=.:tests OMP_NUM_THREADS=1 $(PY) -m fuzz $(ONLY) --seed $(SEED)

audit: setup ## known vulnerabilities of the pinned packages, or that the service which knows them cannot be reached
	$(PY) .ci/audit.py

reference: setup ## make weights/reference.* anew, after WEIGHTS were replaced
	$(PY) -m train.submit.reference --weights $(WEIGHTS) --write

lock: setup ## make requirements.lock from requirements.txt, with the SHA-256 of each file (by uv)
	$(PY) -m pip install --quiet uv
	grep -v '^pydensecrf2' requirements.txt | $(PY) -m uv pip compile - --output-file requirements.lock --quiet --generate-hashes \
		--universal --python-version 3.11 --no-annotate --no-emit-index-url --custom-compile-command "make lock"

clean: ## remove the demo, caches and reports of tests; keeps .venv, stores and runs
	rm -rf $(DEMO) .pytest_cache .ruff_cache .mypy_cache
