# Upkeep of the kit: make -f .ci/tasks.mk <task>
PY := .venv/bin/python
.PHONY: fuzz audit reference lock coverage

fuzz: # search for what breaks solution.py, prep and training: hostile tiles, kills, many tiles (half an hour)
	PYTHONPATH=.:tests OMP_NUM_THREADS=1 $(PY) -m fuzz $(ONLY) --seed $(or $(SEED),0)

audit: # known vulnerabilities of the pinned packages, or that the service which knows them cannot be reached
	$(PY) .ci/audit.py

reference: # make weights/reference.* anew, after the weights were replaced
	$(PY) -m train.submit.reference --write

lock: # make requirements.lock from requirements.txt, with the SHA-256 of each file (by uv)
	$(PY) -m pip install --quiet uv
	grep -v '^pydensecrf2' requirements.txt | $(PY) -m uv pip compile - --output-file requirements.lock --quiet \
		--generate-hashes --universal --python-version 3.11 --no-annotate --no-emit-index-url \
		--custom-compile-command "make -f .ci/tasks.mk lock"

coverage: # the lines that the tests run, file by file
	$(PY) .ci/coverage_table.py $(PARTS)
