# The commands of the project. Nothing but Python is expected: each target makes the virtual environment it runs in and
# installs what it needs there, once; again only when a requirements file has changed.
#   make quickstart            train a tiny Stable Diffusion on the pictures in quickstart/, and look at what it draws
#   make test                  all tests            make check   style, copies, structure: seconds
#   make benchmark             speed and memory     make style   mend what ruff can mend
#   VENV=path                  another environment, for instance one that exists already
#   BASE_PYTHON=python3.12     another Python to make it with
#   ARGS="..."                 more arguments, for quickstart, test and benchmark

VENV ?= .venv
BASE_PYTHON ?= python3
ARGS ?=

PYTHON := $(VENV)/bin/python
PIP := $(PYTHON) -m pip install --disable-pip-version-check --no-input
TRAIN_READY := $(VENV)/.installed-to-train
CHECK_READY := $(VENV)/.installed-to-check
TEST_READY := $(VENV)/.installed-to-test

# Paths may be relative, and a virtual environment's programs (accelerate) are found by those that call them by name.
export PATH := $(abspath $(VENV))/bin:$(PATH)

.DELETE_ON_ERROR:
.PHONY: help quickstart test check style copies benchmark

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

check: $(CHECK_READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) tests/check_copies.py
	$(PYTHON) -m pytest --noconftest tests/test_structure.py

style: $(CHECK_READY)
	$(PYTHON) -m ruff check --fix .

# make copies TAKE="train_text_to_image.py save_checkpoint" gives every script the text that this one has.
copies: $(PYTHON)
	$(PYTHON) tests/check_copies.py $(if $(TAKE),--take-from $(TAKE))

benchmark: $(TRAIN_READY)
	$(PYTHON) benchmarks/run.py $(ARGS)

$(PYTHON):
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Python 3.10 or newer is needed, which $(BASE_PYTHON) is not." \
	       "Install one and name it: make BASE_PYTHON=python3.12 ..." >&2; exit 1; }
	$(BASE_PYTHON) -m venv $(VENV)

# The import shows at once a torch and a torchvision that were not built for each other.
$(TRAIN_READY): requirements.txt | $(PYTHON)
	$(PIP) -r requirements.txt
	@$(PYTHON) -c 'import torch, torchvision' || { \
	  echo "torch and torchvision in $(VENV) do not fit together (see requirements.txt): take another VENV" >&2; exit 1; }
	@touch $@

$(CHECK_READY): tests/requirements.txt | $(PYTHON)
	$(PIP) $$(grep -E '^(pytest$$|ruff)' tests/requirements.txt)
	@touch $@

$(TEST_READY): tests/requirements.txt $(TRAIN_READY) | $(PYTHON)
	$(PIP) -r tests/requirements.txt
	@touch $@
