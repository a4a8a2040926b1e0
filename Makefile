# The two commands of the README; each sets up its own virtual environment first.
PYTHON ?= python3
VENV := .venv
CODE := memcontrol tests benchmarks docs
export OMP_WAIT_POLICY := passive

.PHONY: demo check quick test nightly chaos docs clean

demo: $(VENV)/installed
	$(VENV)/bin/memcontrol demo --out runs/demo

check: $(VENV)/tested
	$(VENV)/bin/ruff check $(CODE)
	$(VENV)/bin/ruff format --check $(CODE)
	$(VENV)/bin/mypy

test: $(VENV)/tested
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist worksteal

# All of it: what takes minutes on a core, too, and tests/nightly.
nightly: $(VENV)/tested
	NIGHTLY=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist worksteal tests tests/nightly/*.py

# What trains nothing and starts no process, in under a minute.
quick: $(VENV)/tested
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist worksteal -m "not slow"

# A search on a real PostgreSQL while everything it stands on is killed, frozen and stopped: five to ten minutes.
chaos: $(VENV)/tested
	OMP_NUM_THREADS=1 $(VENV)/bin/python tests/chaos.py

# The pages as a site, build/site/index.html; a warning, such as of a link that leads nowhere, is an error.
docs: $(VENV)/tested
	$(VENV)/bin/python -m sphinx -W --keep-going --quiet -c docs -d build/doctrees . build/site

# torch comes first and pinned: any looser request may fetch gigabytes of CUDA packages.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt --editable .
	touch $@

$(VENV)/tested: $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
