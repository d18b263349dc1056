# Searching Tissue. `make` alone lists the targets.

PROFILE ?= demo
CORES ?= 2
PYTHON ?= python3
BIN := .venv/bin
HTML := _build/html
export PROFILE

# The chapters and the tests may run in other folders: a relative path is made absolute.
define absolute
ifneq ($$($(1)),)
ifeq ($$(filter /%,$$(firstword $$($(1)))),)
override $(1) := $$(CURDIR)/$$($(1))
endif
export $(1)
endif
endef
$(eval $(call absolute,HISTO_DATA))
$(eval $(call absolute,HISTO_WEIGHTS))

.DEFAULT_GOAL := help
.PHONY: help venv chapters book lint check pytest test publish lab clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' $(MAKEFILE_LIST) | expand -t 18
	@echo "  PROFILE=demo (default), tissue or paper; HISTO_DATA=folder; CORES=2"

venv: .venv/installed  ## install Python packages into .venv

# The stamp appears last: an interrupted installation is done again.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    -c constraints.txt -e ".[networks,cluster,book,dev]"
	touch $@

# Outputs are renamed into place when complete, so no lock is needed, and a killed run
# simply goes on.
chapters: venv
	$(BIN)/snakemake --cores $(CORES) --quiet host rules progress --keep-going \
	    --nolock --rerun-incomplete --config profile=$(PROFILE) </dev/null

# Every page is built anew (seconds): warnings of unchanged pages are not forgotten and
# removed chapters leave nothing behind.
book: chapters  ## run every chapter, build the pages into _build/html and check them
	rm -rf $(HTML)
	$(BIN)/jupyter-book build . --all -W -n --keep-going -q
	test -f $(HTML)/index.html
	$(BIN)/python tools/check_links.py $(HTML)
	@$(BIN)/python tools/run_notebook.py --times --profile $(PROFILE)
	@echo "The $(PROFILE) book is at $(HTML)/index.html"

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --verify --keep-id notebooks/*.ipynb

check: lint  ## lint and fast tests, for daily work
	$(BIN)/python -m pytest -m "not slow"

pytest: venv
	$(BIN)/python -m pytest

# -k: one failure does not hide the next; the last line is the verdict.
test:  ## everything: install, lint, all tests, the demo book
	@if $(MAKE) --no-print-directory -k lint pytest book PROFILE=demo; \
	then echo "make test: PASSED (lint, tests, demo book)"; \
	else echo "make test: FAILED, see above"; exit 1; fi

publish: book  ## build the book and push it to the branch gh-pages
	$(BIN)/ghp-import -n -p -f $(HTML)

lab: venv  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

clean:  ## remove what was built (not .venv, not data)
	rm -rf _build .snakemake
