# Everything a fresh machine needs is Python 3.11+, make and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install run compare test test-slow lint docs bench demo clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"Python {sys.version.split()[0]} is too old: set PYTHON to 3.11 or newer")'
	@echo "Installing torch, transformers, Ray and the tools for tests into $(VENV): 2.4 GB, more with CUDA."
	@echo "This takes 2 to 10 minutes. pip says what it does; its last step, 'Installing collected packages', takes longest."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@start=$$(date +%s) && $(BIN)/python -m pip install -c constraints.txt -e '.[test,lint]' \
		&& echo "Installed in $$(( ($$(date +%s) - start + 30) / 60 )) min; $(VENV) takes $$(du -sh $(VENV) | cut -f1). The next call skips this."
	@touch $@

run: install
	$(BIN)/python launch.py run configs/tiny.yaml

compare: install
	$(BIN)/python launch.py compare configs/models/tiny configs/models/tiny-rl configs/tiny.yaml

test: install
	@T=$$(mktemp -d /tmp/rpt-XXXX) && { $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --basetemp $$T/t; code=$$?; rm -rf $$T; exit $$code; }

# Tests that take a minute or more, listed in CONTRIBUTING.md. For the oldest and newest supported Ray, pip installs both
# into ~/.cache/ray_probe-test-venvs the first time (600 MB). Those of the page need chromium (apt install chromium).
test-slow: install
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[test-slow]'
	@T=$$(mktemp -d /tmp/rpt-XXXX) && { $(BIN)/python -m pytest -m slow --basetemp $$T/t; code=$$?; rm -rf $$T; exit $$code; }

lint: install
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/python .ci/check_words.py ray_probe README.md docs CONTRIBUTING.md CHANGELOG.md
	$(BIN)/mypy

# Writes docs/configuration.md from the models in ray_probe/config/schema.py.
docs: install
	$(BIN)/python docs/generate_configuration.py

bench: install
	$(BIN)/python -m benchmarks

# Trains the demo checkpoints again and writes the prompts (about 5 minutes on 2 cores); all are shipped.
demo: install
	$(BIN)/python configs/make_tiny.py
	$(BIN)/python configs/make_tiny_rl.py

clean:
	rm -rf $(VENV) build *.egg-info
