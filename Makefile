# One command for everything. A machine needs Python >= 3.11, git and make; the rest is made here.

VENV := .venv
BIN := $(VENV)/bin
# Touched after a complete installation: an interrupted one is repeated, a finished one is not.
STAMP := $(VENV)/.installed
# Another interpreter: make PYTHON=/usr/bin/python3.13 test
PYTHON ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format bench fuzz kills matrix pgbouncer citus docs generate lock audit clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

install: $(STAMP)  ## make the environment (.venv); the other targets do it by themselves

$(STAMP): pyproject.toml tools/make_venv.sh
	@sh tools/make_venv.sh $(VENV) "$(PYTHON)"
	@touch $@

demo: $(STAMP)  ## a conversation starts on SQLite, moves to Postgres, is verified and goes on there
	@$(BIN)/python tools/demo.py

test: $(STAMP)  ## all tests, on a real Postgres server; the parity matrix is current
	@mkdir -p build
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --junitxml=build/tests.xml
	@$(BIN)/python tools/parity_matrix.py --check --junit build/tests.xml

lint: $(STAMP)  ## ruff, mypy, import rules, generated documents
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/settings_table.py --check
	$(BIN)/python tools/cli_reference.py --check
	$(BIN)/python tools/head_sql.py --check

format: $(STAMP)  ## bring the code into the house format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

generate: $(STAMP)  ## write the generated documents anew
	$(BIN)/python tools/settings_table.py
	$(BIN)/python tools/parity_matrix.py
	$(BIN)/python tools/cli_reference.py
	$(BIN)/python tools/head_sql.py

lock: $(STAMP)  ## pin the newest packages for the image in requirements.txt
	$(BIN)/uv pip compile pyproject.toml --extra postgres --extra encryption --extra serve --group service --universal \
	  --python-version 3.11 --generate-hashes --upgrade --quiet --custom-compile-command "make lock" -o requirements.txt

# Apart from lint: it asks an advisory service over the network, and its answer changes without a change here.
audit: $(STAMP)  ## known vulnerabilities of the image's packages, and of this environment's
	$(BIN)/pip-audit --require-hashes --disable-pip --requirement requirements.txt
	$(BIN)/pip-audit --skip-editable

fuzz: $(STAMP)  ## six savers against the reference model, long: make fuzz FUZZ_EXAMPLES=1000
	FUZZ_EXAMPLES=$(or $(FUZZ_EXAMPLES),3000) $(BIN)/python -m pytest tests/contract/test_differential.py -q -s --timeout 0

kills: $(STAMP)  ## transfers killed at every commit boundary and at random instants, hundreds of times
	KILLS=full FOLLOW_KILLS=50 $(BIN)/python -m pytest tests/transfer/kills tests/transfer/test_follow*.py -q -s --timeout 0

matrix: $(STAMP)  ## the contract suite on every Postgres that can be had
	$(BIN)/python tools/matrix.py

pgbouncer: $(STAMP)  ## the savers through a real PgBouncer, which must be installed
	$(BIN)/python -m pytest tests/pgbouncer/savers.py -q

citus: $(STAMP)  ## the contract suite on distributed tables: PERSISTENCE_TEST_CITUS names a coordinator
	$(BIN)/python -m pytest tests/citus/around.py tests/citus/savers.py -q

bench: $(STAMP)  ## our savers against the official ones, side by side
	$(BIN)/python tools/bench.py

docs: $(STAMP)  ## build the documentation site into site/, strictly
	$(BIN)/zensical build --strict --clean

clean:  ## remove what the other targets made
	rm -rf $(VENV) .demo site dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .cache
