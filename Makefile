# The commands of the project. Nothing but Python is expected: each target makes the virtual environment it runs in and
# installs what it needs there, once; again only when requirements or constraints.txt have changed.
#   make quickstart            train a tiny Stable Diffusion on the pictures in quickstart/, and look at what it draws
#   make test                  all tests            make check   style, copies, structure, sizes: seconds
#   make torture MINUTES=60    kill runs of each script at random moments, and compare how they end
#   make benchmark             speed and memory     make style   fix what ruff can fix
#   make test NEWEST=1         all tests with the newest packages that requirements*.txt allow, in .venv-newest
#   make test OLDEST=1         the same with the lower bounds, in .venv-oldest
#   make constraints           as NEWEST=1, and if they pass, constraints.txt is what they passed with
#   VENV=path                  another environment, for instance one that exists already
#   CONSTRAINTS=               the versions in that environment that requirements*.txt allow, not the tested ones
#   BASE_PYTHON=python3.12     another Python to make it with
#   ARGS="..."                 more arguments, for quickstart, test and benchmark

VENV ?= .venv$(if $(NEWEST),-newest)$(if $(OLDEST),-oldest)
BASE_PYTHON ?= python3
CONSTRAINTS ?= $(if $(NEWEST),,$(if $(OLDEST),.oldest.txt,constraints.txt))
ARGS ?=
MINUTES ?= 60

PYTHON := $(VENV)/bin/python
# PIP_CONSTRAINT replaces a constraint in the user's pip configuration, which may clash with these versions.
PIP := $(if $(CONSTRAINTS),PIP_CONSTRAINT=$(CONSTRAINTS)) $(PYTHON) -m pip install --disable-pip-version-check \
       --no-input $(if $(NEWEST),--upgrade --upgrade-strategy eager)
TRAIN_READY := $(VENV)/.installed-to-train
CHECK_READY := $(VENV)/.installed-to-check
TEST_READY := $(VENV)/.installed-to-test

# Paths may be relative, and a virtual environment's programs (accelerate) are found by those that call them by name.
export PATH := $(abspath $(VENV))/bin:$(PATH)

.DELETE_ON_ERROR:
.PHONY: help quickstart test torture check style copies benchmark constraints newest

help:
	@sed -n 's/^#   //p' Makefile

quickstart: $(TRAIN_READY)
	$(PYTHON) quickstart/quickstart.py $(ARGS)

# Two processes, each with half of the tests in their order; who is done first takes over what the other has left.
test: WORKERS := -n 2 --dist worksteal
# No test may reach the network, or read or fill the caches of the person who runs it.
test: $(TEST_READY)
	@home=$$(mktemp -d) && trap 'rm -rf "$$home"' EXIT && \
	HF_HOME="$$home" HF_HUB_OFFLINE=1 WANDB_MODE=offline $(PYTHON) -m pytest $(WORKERS) $(ARGS)

torture: $(TEST_READY)
	HF_HUB_OFFLINE=1 $(PYTHON) tests/torture.py --minutes $(MINUTES) $(ARGS)

check: $(CHECK_READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) tests/check_copies.py
	$(PYTHON) -m pytest --noconftest tests/test_structure.py tests/test_sizes.py

style: $(CHECK_READY)
	$(PYTHON) -m ruff check --fix .

# make copies TAKE="train_text_to_image.py save_checkpoint" gives every script the text that this one has.
copies: $(PYTHON)
	$(PYTHON) tests/check_copies.py $(if $(TAKE),--take-from $(TAKE))

constraints:
	$(MAKE) test NEWEST=1
	{ grep '^#' constraints.txt; .venv-newest/bin/python -m pip freeze --all | \
	  grep -Ev '^(nvidia-|cuda-|(triton|pip|wheel)==)'; } > .constraints.new
	mv .constraints.new constraints.txt

benchmark: $(TRAIN_READY)
	$(PYTHON) benchmarks/run.py $(ARGS)

$(PYTHON):
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, which $(BASE_PYTHON) is not." \
	       "Install one and name it: make BASE_PYTHON=python3.12 ..." >&2; exit 1; }
	$(BASE_PYTHON) -m venv $(VENV)

# The import shows at once a torch and a torchvision that were not built for each other.
$(TRAIN_READY): requirements.txt $(CONSTRAINTS) | $(PYTHON)
	$(PIP) -r requirements.txt
	@$(PYTHON) -c 'import torch, torchvision' || { \
	  echo "torch and torchvision in $(VENV) do not fit together (see requirements.txt): take another VENV" >&2; exit 1; }
	@touch $@

$(CHECK_READY): tests/requirements.txt $(CONSTRAINTS) | $(PYTHON)
	$(PIP) $$(grep -E '^(pytest$$|ruff)' tests/requirements.txt)
	@touch $@

$(TEST_READY): tests/requirements.txt requirements_flax.txt $(TRAIN_READY) $(if $(NEWEST),newest) | $(PYTHON)
	$(PIP) -r tests/requirements.txt
	@touch $@

.oldest.txt: requirements.txt requirements_flax.txt
	grep -ohE '^[a-z_]+>=[0-9.]+' $^ | sed 's/>=/==/' > $@

newest:  # never up to date: a release may be newer than the last installation
