# Searching Tissue. `make` alone lists the commands.

PROFILE ?= demo
CORES ?= 2
EXPERIMENT ?=
OVERRIDE ?=
PYTHON ?= python3
BIN := .venv/bin
HTML := _build/html
LOG := _build/log
SHELL := /bin/bash
export PROFILE
export PIP_ROOT_USER_ACTION := ignore

# Chapters and tests may run in other folders: a relative path is made absolute.
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

# $(call quiet,name,command): what the command says goes to a log, shown if it fails.
quiet = mkdir -p $(LOG) && { $(2) >$(LOG)/$(1).log 2>&1 || { cat $(LOG)/$(1).log; exit 1; }; }

.DEFAULT_GOAL := help
.PHONY: help venv chapters book paper lint check pytest test plan publish lab clean

help:  ## list the commands
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' $(MAKEFILE_LIST) | expand -t 18
	@echo "  PROFILE=demo (default), tissue or paper; HISTO_DATA=folder; CORES=2"

venv: .venv/installed  ## install the packages into .venv

# The stamp appears last: an interrupted installation is done again.
.venv/installed: pyproject.toml constraints.txt
	@echo "Installing the packages into .venv (some minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check \
	    -c constraints.txt -e ".[networks,cluster,book,dev]"
	@touch $@

# run_notebook.py prints a line per chapter; all else is shown only after a failure.
# Outputs are renamed into place when complete, so no lock is needed, and a killed run
# simply goes on. $(call run,profile,target)
run = mkdir -p $(LOG); set -o pipefail; \
	$(BIN)/snakemake --cores $(CORES) --quiet host rules progress --keep-going \
	    --nolock --rerun-incomplete $(2) --config profile=$(1) override=$(OVERRIDE) \
	    </dev/null 2>&1 | tee $(LOG)/chapters.log | sed -un '/^\[[0-9]*\/[0-9]*\] /p; /^\[data\] /p' \
	    || { cat $(LOG)/chapters.log; exit 1; }

chapters: venv
	@if [ "$(PROFILE)" = paper ]; then $(BIN)/python tools/paper.py list; fi
	@$(call run,$(PROFILE),)

paper: venv  ## run one experiment of a paper: EXPERIMENT=tl_vgg16 (without: the names)
	@target=$$($(BIN)/python tools/paper.py target "$(EXPERIMENT)") || exit 1; \
	$(call run,paper,"$$target")

# Every page is built anew (seconds): warnings of unchanged pages are not forgotten and
# removed chapters leave nothing behind.
book: chapters  ## run all chapters, build the pages into _build/html, check their links
	@rm -rf $(HTML)
	@$(BIN)/python tools/experiment_pages.py $(PROFILE)
	@$(call quiet,pages,$(BIN)/jupyter-book build . --toc _build/toc.yml --all -W -n --keep-going -q)
	@test -f $(HTML)/index.html
	@$(call quiet,links,$(BIN)/python tools/check_links.py $(HTML))
	@echo "The $(PROFILE) book is at $(HTML)/index.html"

lint: venv
	@$(BIN)/ruff check -q .
	@$(BIN)/ruff format --check -q .
	@$(BIN)/nbstripout --verify --keep-id notebooks/*.ipynb

check: lint  ## lint and the fast tests, for daily work
	@$(BIN)/python -m pytest -m "not slow"

pytest: venv
	@$(BIN)/python -m pytest

# -k: one failure does not hide the next; the last line says whether all passed.
test:  ## install, lint, all tests, the demo book
	@if $(MAKE) --no-print-directory -k lint pytest book PROFILE=demo; \
	then echo "make test: PASSED (lint, tests, demo book)"; \
	else echo "make test: FAILED, see the messages before this line"; exit 1; fi

plan: venv  ## what the papers' experiments need: data, GB, hours, before any is run
	@$(BIN)/python tools/plan.py $(PLAN)

publish: book  ## build the book and push it to the branch gh-pages
	$(BIN)/ghp-import -n -p -f $(HTML)

lab: venv  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

clean:  ## remove what was built (not .venv, not data)
	rm -rf _build .snakemake
