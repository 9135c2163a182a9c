# Every target sets itself up: it needs Python 3.11 or newer with pip and venv, and make.
PYTHON ?= python3
VENV ?= .venv
DATA ?= ../shared/data
WEIGHTS ?= ../shared/weights
RUN ?= runs/default
# Quoted below, as their names may hold spaces: a shell leaves `~` alone there.
override DATA := $(patsubst ~/%,$(HOME)/%,$(DATA))
override WEIGHTS := $(patsubst ~/%,$(HOME)/%,$(WEIGHTS))
override RUN := $(patsubst ~/%,$(HOME)/%,$(RUN))

# As pip does: behind a hospital's proxy the machine's own certificates are the ones that count.
export UV_SYSTEM_CERTS := true

uv := $(VENV)/bin/uv
install := $(uv) pip install --quiet --python $(VENV)/bin/python --require-hashes
editable := $(uv) pip install --quiet --python $(VENV)/bin/python --no-deps --no-build-isolation -e .

.PHONY: serve training test test-slow lint check default-bundle benchmark bench-serve bench-serve-gpu \
	reliability fuzz secrets audit sbom docs lock lock-peers clean

## Serve the shipped bundle on http://127.0.0.1:8000 (settings: MMTL_*; see docs/settings.md).
serve: $(VENV)/.cpu
	@$(VENV)/bin/mmtl serve

## Install what `mmtl-train` needs, and what development does.
training: $(VENV)/.dev

## Lint, types and the import contract.
lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

## Every test but the slow ones (test-slow), the service as a process in an environment without torch included. Most of
## it computes on one core: two processes take a file of tests each, and their OpenMP threads do not compete.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n 2 --dist loadfile

## Every backbone of the zoo through the whole benchmark, the largest included (minutes and gigabytes).
test-slow: $(VENV)/.dev
	$(VENV)/bin/pytest -m slow

## What .ci/run runs.
check: lint
	$(MAKE) test

## Retrain, evaluate and export the shipped bundle from the data folder (more than an hour on two cores).
default-bundle: $(VENV)/.dev
	$(VENV)/bin/mmtl-train prepare "$(DATA)" --config configs/default.toml --run "$(RUN)"
	$(VENV)/bin/mmtl-train fit --run "$(RUN)"
	$(VENV)/bin/mmtl-train export --run "$(RUN)" --bundle models/default --name mmtl-lite2 --version 0.4.0
	$(VENV)/bin/mmtl-train quantize --run "$(RUN)" --bundle models/default
	$(VENV)/bin/mmtl-train evaluate "$(DATA)" --run "$(RUN)" --bundle models/default --publish \
		--out docs/evaluation
	$(VENV)/bin/python benchmarks/targets.py > docs/targets.md.part
	mv docs/targets.md.part docs/targets.md

# Bundles that shipped before, out of this repository's history: teachers (configs/distilled.toml).
shipped_0.2.0 := fa6b4c0
shipped_0.3.0 := e7b7561
runs/teachers/%:
	mkdir -p $@.part
	git archive $(shipped_$*) models/default | tar -x --strip-components=2 -C $@.part
	mv $@.part $@

## Rank the backbones whose weights are in WEIGHTS or in packages, on the balanced set's val pixels.
benchmark: $(VENV)/.dev
	$(VENV)/bin/mmtl-train data split "$(DATA)" --paper -o runs/paper.csv
	$(VENV)/bin/mmtl-train benchmark runs/paper.csv --split test --offline \
		--weights-dir "$(WEIGHTS)" --weights-notes docs/benchmark/weights.toml \
		--finetune 3 --run runs/benchmark --out docs/benchmark

## mmtl beside LitServe, BentoML, Ray Serve and FastAPI (an hour and a half, Linux, 12 GB of memory; installs each on its own).
bench-serve: $(VENV)/.dev
	$(VENV)/bin/python -m benchmarks.serving.compare "$(DATA)"

## The same on an NVIDIA GPU, on such a host (half an hour).
bench-serve-gpu: $(VENV)/.dev
	$(VENV)/bin/python -m benchmarks.serving.gpu "$(DATA)"

## Keys and passwords for docker-compose.yml, made once, under docker/secrets (not in git).
secrets: docker/secrets/service/keys.json docker/secrets/grafana_password
docker/secrets/service/keys.json: | $(VENV)/.cpu
	@umask 077; mkdir -p $(@D)
	@chmod 700 docker/secrets  # whose files the containers' users read, and no other user of this host
	@rm -f $@.part
	@$(VENV)/bin/mmtl keys create prometheus --scope metrics --file $@.part > docker/secrets/metrics_key.part
	@tr -d '\n' < docker/secrets/metrics_key.part > docker/secrets/metrics_key  # Kubernetes sends it as it is
	@rm docker/secrets/metrics_key.part
	@umask 077; $(VENV)/bin/mmtl keys create administrator --scope predict --scope admin --file $@.part \
		> docker/secrets/administrator_key
	@chmod 755 $(@D)
	@chmod 644 $@.part docker/secrets/metrics_key
	@mv $@.part $@
	@echo "docker/secrets: service/keys.json, metrics_key (Prometheus), administrator_key (you)"
docker/secrets/grafana_password:
	@mkdir -p $(@D)
	@$(PYTHON) -c "import secrets; print(secrets.token_urlsafe(18), end='')" > $@.part
	@chmod 644 $@.part
	@mv $@.part $@
	@echo "docker/secrets/grafana_password: of Grafana's user admin"

## Known vulnerabilities of what an image holds; says so where no advisories can be reached.
audit: $(VENV)/.audit
	@$(VENV)/bin/python docker/audit.py requirements/cpu.txt requirements/gpu.txt

## A software bill of materials (CycloneDX) of the service: sbom.json.
sbom: $(VENV)/.audit
	$(VENV)/bin/python -W ignore::UserWarning -m cyclonedx_py requirements requirements/cpu.txt --pyproject pyproject.toml \
		--output-reproducible --of JSON -o sbom.json

$(VENV)/.audit: requirements/audit.txt $(VENV)/.dev
	@$(install) -r requirements/audit.txt
	@touch $@

## Load with faults, attacks and fuzzers, and docs/reliability.md from them (half an hour).
reliability: $(VENV)/.dev
	$(VENV)/bin/python -m benchmarks.reliability.drill "$(DATA)"
	$(VENV)/bin/python -m benchmarks.reliability.attacks
	$(MAKE) fuzz
	$(VENV)/bin/python -m benchmarks.reliability.page > docs/reliability.md.part
	mv docs/reliability.md.part docs/reliability.md

## A million images, twenty thousand manifests, and requests after the OpenAPI description.
fuzz: .venv-fuzz/.installed
	@mkdir -p runs/reliability
	benchmarks/reliability/fuzz.sh

.venv-fuzz/.installed: requirements/fuzz.txt | $(uv)
	@$(PYTHON) -m venv .venv-fuzz
	@$(uv) pip install --quiet --python .venv-fuzz/bin/python --require-hashes -r requirements/fuzz.txt
	@$(uv) pip install --quiet --python .venv-fuzz/bin/python --no-deps --no-build-isolation -e .
	@touch $@

## Write docs/openapi.json, settings.md and problems.md anew; a breaking change of the HTTP contract is refused.
docs: $(VENV)/.dev
	$(VENV)/bin/pytest -q tests/app/test_openapi.py -k breaking
	$(VENV)/bin/mmtl openapi > docs/openapi.json.part && mv docs/openapi.json.part docs/openapi.json
	$(VENV)/bin/mmtl settings > docs/settings.md.part && mv docs/settings.md.part docs/settings.md
	$(VENV)/bin/mmtl problems > docs/problems.md.part && mv docs/problems.md.part docs/problems.md

$(uv): requirements/bootstrap.txt
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --require-hashes -r requirements/bootstrap.txt
	@touch $@

$(VENV)/.cpu: requirements/cpu.txt pyproject.toml | $(uv)
	@$(install) --compile-bytecode -r requirements/cpu.txt
	@$(editable)
	@touch $@

$(VENV)/.dev: requirements/dev.txt pyproject.toml | $(uv)
	@$(install) -r requirements/dev.txt
	@$(editable)
	@touch $@ $(VENV)/.cpu

## Resolve the hash-locked requirement files anew (no file names a registry).
lock := $(uv) pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-header --no-annotate
lock: | $(uv)
	echo uv | $(lock) - -o requirements/bootstrap.txt
	echo hatchling | $(lock) pyproject.toml - --extra cpu --extra oidc --extra signatures --extra tracing -o requirements/cpu.txt
	echo hatchling | $(lock) pyproject.toml - --extra gpu --extra oidc --extra signatures --extra tracing -c requirements/cpu.txt -o requirements/gpu.txt
	$(lock) pyproject.toml --extra cpu --extra oidc --extra signatures --extra tracing --extra training -c requirements/cpu.txt \
		-o requirements/training.txt
	$(lock) pyproject.toml --extra cpu --extra oidc --extra signatures --extra tracing --extra training --extra dev -c requirements/training.txt \
		-o requirements/dev.txt
	printf 'hatchling\natheris\nschemathesis\n' | $(lock) pyproject.toml - --extra cpu --extra oidc --extra signatures --extra tracing \
		-c requirements/cpu.txt -o requirements/fuzz.txt
	printf 'pip-audit\ncyclonedx-bom\n' | $(lock) - -c requirements/dev.txt -o requirements/audit.txt

## The same of what `make bench-serve` and `make bench-serve-gpu` measure mmtl beside.
peers := benchmarks/serving/requirements
alike := onnxruntime\nnumpy\npillow\npython-multipart\n
lock-peers: | $(uv)
	printf 'fastapi\nuvicorn[standard]\n$(alike)' | $(lock) - -c requirements/cpu.txt -o $(peers)-fastapi.txt
	printf 'litserve\nuvicorn[standard]\n$(alike)' | $(lock) - -c requirements/cpu.txt -o $(peers)-litserve.txt
	printf 'ray[serve]\nray-haproxy\nuvicorn[standard]\n$(alike)' | $(lock) - -c requirements/cpu.txt -o $(peers)-ray.txt
	printf 'bentoml>=1.4\n$(alike)' | $(lock) - -o $(peers)-bentoml.txt  # it has OpenTelemetry of its own
	echo 'onnxruntime-gpu[cuda,cudnn]' | $(lock) - $(addprefix --no-emit-package=,flatbuffers numpy packaging protobuf) \
		-o $(peers)-onnxruntime-gpu.txt

clean:
	rm -rf $(VENV) .venv-e2e .mypy_cache .ruff_cache .pytest_cache .hypothesis
