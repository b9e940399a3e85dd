# Two commands matter: `make serve` and `make test`. Both work from a fresh clone with Python 3.11 or newer.
.DEFAULT_GOAL := help
.PHONY: help install serve test fuzz sbom audit check train evaluate simulate bench chaos rules lock clean

PYTHON ?=
DATA   ?= /usr/share/datasets/fashion-mnist
OUT    ?= weights/fashion-mnist
ARGS   ?=
FUZZ_EXAMPLES ?= 200

VENV := .venv
RUN  := $(VENV)/bin/python
# A copy of the lock, laid down when all of it is installed: newer than the lock means up to date.
STAMP := $(VENV)/requirements.installed
# The servers that `make bench` compares with have an environment, a lock and a stamp of their own.
PEERS       := .venv-bench
PEERS_STAMP := $(PEERS)/requirements.installed

# So have the programs that look at the dependencies from outside.
AUDIT       := .venv-audit
AUDIT_STAMP := $(AUDIT)/installed
AUDITORS    := 'cyclonedx-bom>=7,<8' 'pip-audit>=2.9,<3'

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  variables: PYTHON (which interpreter makes .venv), DATA, OUT (training), ARGS (passed on to the program)"

# Into either environment torch goes alone with what it needs, since its CUDA build has libraries that the lock
# does not list; everything else exactly as locked, which spares pip a search of many minutes.
install: $(STAMP) ## make .venv and install the locked dependencies; costs nothing when up to date

$(STAMP): requirements.txt
	@if cmp -s requirements.txt $@; then touch $@; exit 0; fi; \
	set -e; \
	if [ ! -x $(RUN) ]; then \
		for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python); do \
			if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
		done; \
		if [ -z "$$found" ]; then echo "Python 3.11 or newer is needed; name one with PYTHON=..." >&2; exit 1; fi; \
		echo "making $(VENV) with $$($$found --version)"; \
		$$found -m venv $(VENV); \
	fi; \
	echo "installing requirements.txt into $(VENV)"; \
	pip="$(RUN) -m pip install --disable-pip-version-check"; \
	$$pip --constraint requirements.txt "$$(grep '^torch==' requirements.txt)"; \
	$$pip --no-deps --requirement requirements.txt; \
	cp requirements.txt $@

serve: install ## run the service on http://127.0.0.1:8000 (flags in ARGS)
	$(RUN) -m service $(ARGS)

test: install ## run the tests, in as many processes as there are cores
	$(RUN) -m pytest --numprocesses auto $(ARGS)

fuzz: install ## ask every route for what it does not expect (FUZZ_EXAMPLES of each: minutes)
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(RUN) -m pytest tests/service/test_fuzz.py tests/service/tasks/test_uploads_fuzz.py $(ARGS)

sbom: $(AUDIT_STAMP) ## list what the service is made of, as CycloneDX: build/sbom.json
	mkdir -p build
	$(AUDIT)/bin/cyclonedx-py requirements requirements-serve.txt --pyproject pyproject.toml \
		--output-reproducible --output-format JSON --output-file build/sbom.json

audit: $(AUDIT_STAMP) ## look for known vulnerabilities of what is served, with Ray Serve (needs the internet)
	$(AUDIT)/bin/pip-audit --requirement requirements-cluster.txt --no-deps --disable-pip --strict

$(AUDIT_STAMP): | install
	$(RUN) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --disable-pip-version-check $(AUDITORS)
	touch $@

check: install ## formatting, lint, types, container, Kubernetes and alert files
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(VENV)/bin/hadolint Dockerfile
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml docker/compose.gpu.yml
	@if command -v promtool >/dev/null; then \
		set -ex; \
		promtool check config docker/prometheus.yml; \
		promtool test rules docker/alerts_test.yml; \
	else \
		echo "SKIPPED: promtool is not installed, so docker/prometheus.yml and the alerts are not checked"; \
	fi
	bash -n docker/build-check
	@if command -v kubectl >/dev/null; then \
		set -e; \
		for overlay in docker/kubernetes/overlays/*; do \
			case $$overlay in \
				*/ray-*) validate="$(RUN) -m tests.ray_service" ;; \
				*) validate="$(VENV)/bin/kubernetes-validate --strict --quiet /dev/stdin" ;; \
			esac; \
			echo "kubectl kustomize $$overlay | $$validate"; \
			manifests=$$(kubectl kustomize $$overlay); \
			echo "$$manifests" | $$validate; \
		done; \
	else \
		echo "SKIPPED: kubectl is not installed, so the overlays of docker/kubernetes are not built"; \
	fi

train: install ## train the default model; stops and resumes (DATA, OUT, ARGS)
	$(RUN) -m model.training.train --data $(DATA) --out $(OUT) --bf16 --compile $(ARGS)

evaluate: install ## measure a trained model (DATA, OUT, ARGS)
	$(RUN) -m model.evaluation.evaluate --data $(DATA) --model $(OUT) $(ARGS)

simulate: install ## simulate load on the scheduler
	$(RUN) -m bench.simulate $(ARGS)

bench: $(PEERS_STAMP) ## compare with other servers under load: hours; stops and resumes (ARGS=--quick: minutes)
	$(PEERS)/bin/python -m bench.compare --out docs $(ARGS)

chaos: install ## disturb the service while it works, in every way: a quarter of an hour (ARGS=--short: a minute)
	$(RUN) -m bench.chaos $(ARGS)

$(PEERS_STAMP): requirements-bench.txt | install
	@set -e; \
	if [ ! -x $(PEERS)/bin/python ]; then $(RUN) -m venv $(PEERS); fi; \
	echo "installing requirements-bench.txt into $(PEERS)"; \
	pip="$(PEERS)/bin/python -m pip install --disable-pip-version-check"; \
	$$pip --constraint requirements-bench.txt "$$(grep '^torch==' requirements-bench.txt)"; \
	$$pip --no-deps --requirement requirements-bench.txt; \
	cp requirements-bench.txt $@

rules: install ## rewrite the PrometheusRule from docker/alerts.yml
	$(RUN) -m tests.prometheus_rule

lock: ## rewrite the lock files from pyproject.toml and what .venv and .venv-bench hold
	$(RUN) -m tests.locks requirements.txt requirements-serve.txt requirements-cluster.txt
	if [ -x $(PEERS)/bin/python ]; then $(PEERS)/bin/python -m tests.locks requirements-bench.txt; fi

clean: ## remove the environments and the tools' caches
	rm -rf $(VENV) $(PEERS) $(AUDIT) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
