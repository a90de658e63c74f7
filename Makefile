# Everything a person types; `make` alone lists it. The environment is made by whatever needs it first.

UV_VERSION := 0.13.8
# torch has wheels for these
FIND_PYTHON := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))

.DEFAULT_GOAL := help
.PHONY: help setup demo results test test-slow check bench

help:
	@echo "make demo       data, training A-E, evaluation and report at size nano (minutes on two cores)"
	@echo "make results    the same at size micro (about an hour)"
	@echo "make test       the gate and the fast tests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make check      the gate alone: ruff, mypy, import rules"
	@echo "make bench      how fast each stage trains here, beside peers from transformers (on an otherwise idle machine)"
	@echo "make setup      the environment alone: .venv from uv.lock"

setup: .venv/.ready

# The stamp is written last, so an interrupted set-up is done again and a finished one costs nothing. The system's
# certificates are used because a company's proxy has its own.
.venv/.ready: pyproject.toml uv.lock
	@python=; \
	for name in python3 python3.13 python3.12 python3.11 python3.14 python; do \
		if $$name -c '$(FIND_PYTHON)' >/dev/null 2>&1; then python=$$(command -v $$name); break; fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "setup: found no Python 3.11 to 3.14 on PATH, expected one; install it and run make again" >&2; exit 1; \
	fi; \
	uv=$$(command -v uv || true); \
	if [ -z "$$uv" ]; then \
		uv=.uv/bin/uv; \
		if [ ! -x $$uv ]; then \
			echo "setup: fetching uv $(UV_VERSION) into .uv"; rm -rf .uv; \
			if "$$python" -m venv .uv >/dev/null 2>&1; then \
				.uv/bin/python -m pip install --quiet "uv==$(UV_VERSION)"; \
			else \
				rm -rf .uv; "$$python" -m pip install --quiet --target .uv "uv==$(UV_VERSION)"; \
			fi || { rm -rf .uv; echo "setup: uv could not be fetched; install it (https://docs.astral.sh/uv) and run make again" >&2; exit 1; }; \
		fi; \
	fi; \
	echo "setup: $$("$$python" --version), $$($$uv --version), .venv from uv.lock"; \
	UV_SYSTEM_CERTS=true UV_PROJECT_ENVIRONMENT=.venv "$$uv" sync --quiet --frozen --all-extras --python "$$python" && touch $@

demo: setup
	@.venv/bin/omni run --size nano

results: setup
	@.venv/bin/omni run --size micro

test: check
	@.venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: check
	@.venv/bin/python -m pytest -m slow

check: setup
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check --quiet . || { .venv/bin/ruff format --check .; exit 1; }
	@.venv/bin/mypy
	@.venv/bin/python -m pytest tests/test_imports.py

# SIZE=tiny for other configurations; bench/gpu.sh is the same on a CUDA device, without an environment of its own
bench: setup
	@.venv/bin/python -m bench --size $(or $(SIZE),nano) --json runs/bench_$(or $(SIZE),nano).json
