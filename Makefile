# keyward's workshop. "make help" lists the targets. Everything comes from package registries.

# Tools, pinned here and nowhere else. They go into .tools, which git ignores.
GOLANGCI_LINT_VERSION := v2.15.0
ENVOY_VERSION         := 1.40.0
# The Envoys that tests need besides the default one.
ENVOY_TEST_VERSIONS   := 1.36.4 1.38.3

VERSION ?= $(ENVOY_VERSION)
TOOLS   := $(CURDIR)/.tools
PYTHON  ?= python3
# How long each fuzz target is fed, and which: FUZZTIME=10m FUZZ=FuzzConfig.
FUZZTIME ?= 10s
FUZZ     ?= .
# More of "make test": TESTFLAGS="-run TestThis -v".
TESTFLAGS ?=
# Lengths of "make bench" and "make bench-envoy". A first look: ROUNDS=1 MEASURE=300ms KEYS=500 SAMPLES=2000 FLOOD=10000.
ROUNDS  ?= 5
MEASURE ?= 1500ms
KEYS    ?= 10000
SAMPLES ?= 1000000
FLOOD   ?= 1000000
# Keys of "make bench-scale".
SCALE_KEYS ?= 10000000

.PHONY: all help build dev test fuzz bench bench-envoy bench-go bench-scale lint fmt envoy envoys chromium screenshots clean

all: build lint test

help: ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## build bin/keyward
	CGO_ENABLED=0 go build -trimpath -o bin/keyward ./cmd/keyward

dev: build ## Envoy, a demo service and keyward in one terminal, with a first key
	@$(MAKE) --no-print-directory have-envoy
	@bin/keyward dev

test: envoys schemathesis chromium promtool ## get what the tests need, then run all of them with the race detector
	go test -race -shuffle=on -timeout 30m $(TESTFLAGS) ./...
	@# Without it: what the detector's own cost would hide, allocations and load.
	go test -timeout 10m -run TestLeasesUnderLoad $(TESTFLAGS) ./envoy/e2e
	go test -timeout 10m $(TESTFLAGS) $$(go list -f '{{if or .TestGoFiles .XTestGoFiles}}{{.ImportPath}}{{end}}' ./authz/... ./cache/... ./limits/... ./envoy/accesslog ./envoy/check)
	go -C envoy/benchmarks test ./...

fuzz: ## feed every fuzz target for 10 s (FUZZTIME=10m for longer, FUZZ=FuzzConfig for one)
	@.ci/fuzz '$(FUZZTIME)' '$(FUZZ)'

bench: benchmarks ## compare Checks with a constant answer, over the wire; writes docs/performance.md
	bin/benchmarks checks -rounds $(ROUNDS) -measure $(MEASURE) -keys $(KEYS) -samples $(SAMPLES) -flood $(FLOOD)

bench-envoy: benchmarks have-envoy ## what an authorizer costs behind a real Envoy; writes docs/performance.md
	bin/benchmarks envoy -rounds $(ROUNDS) -measure $(MEASURE) -keys $(KEYS)

bench-go: have-envoy ## Go benchmarks: rules, state, access logs, and max-concurrent through Envoy
	go test -run '^$$' -bench . ./authz/... ./cache ./limits/... ./envoy/accesslog ./envoy/check
	go test -run '^$$' -bench . -benchtime 1x ./envoy/e2e

bench-scale: ## measure start, memory, garbage collection and CPU with SCALE_KEYS=10000000 keys in the store (6 GB of disk in TMPDIR)
	cd cmd/keyward && KEYS=$(SCALE_KEYS) DOC=$(CURDIR)/docs/performance.md go test -run '^$$' -bench StateAtScale -benchtime 1x -timeout 3h .

# What is compared: keyward, the same with the standard codec, and the comparison itself.
.PHONY: benchmarks
benchmarks: build
	CGO_ENABLED=0 go build -trimpath -tags keyward_standard_codec -o bin/keyward-standard ./cmd/keyward
	go -C envoy/benchmarks build -trimpath -o ../../bin/benchmarks .

lint: $(TOOLS)/golangci-lint-$(GOLANGCI_LINT_VERSION) ## vet, formatting, golangci-lint, tidy go.mod
	go vet ./...
	go vet -tags keyward_standard_codec ./cmd/keyward
	$< run --allow-parallel-runners ./...
	cd envoy/benchmarks && $< run --allow-parallel-runners ./...
	go mod tidy -diff
	go -C envoy/benchmarks mod tidy -diff

fmt: ## format all Go code
	gofmt -w $$(git ls-files '*.go')

envoy: ## get an Envoy into .envoy (VERSION=1.36.4 for another one)
	@$(PYTHON) envoy/envoytest/fetch.py $(VERSION)

# The Envoys that tests want. An Envoy of the user's own (ENVOY_BIN, PATH) serves as the default one.
envoys: have-envoy
	@for v in $(ENVOY_TEST_VERSIONS); do $(PYTHON) envoy/envoytest/fetch.py $$v || exit 1; done

.PHONY: have-envoy
have-envoy:
	@[ -n "$$ENVOY_BIN" ] || command -v envoy >/dev/null || $(PYTHON) envoy/envoytest/fetch.py $(ENVOY_VERSION)

screenshots: have-envoy chromium ## pictures of every page of the portal, into docs/screenshots
	go test -count=1 -run TestPortalPagesAreForEverybody ./envoy/e2e -screenshots $(CURDIR)/docs/screenshots

# Asks a server what its OpenAPI document says: TestSchemathesis. Without it the test is skipped, in CI it fails.
.PHONY: schemathesis
schemathesis:
	@$(MAKE) --no-print-directory $(TOOLS)/schemathesis/.complete || { \
		echo "schemathesis is not to be had, so TestSchemathesis is skipped: it needs $(PYTHON) with venv and pip, and its packages"; \
		[ -z "$$CI" ]; }

# What looks at the portal. Without it those tests are skipped, in CI they fail.
chromium: ## get a Chromium for the tests of the portal, with apt-get where that is allowed
	@command -v chromium || command -v chromium-browser || command -v google-chrome || command -v google-chrome-stable || { \
		[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; } || { \
		echo "Chromium is not to be had, so the tests of the portal in a browser are skipped: install chromium, chromium-browser or google-chrome"; \
		[ -z "$$CI" ]; }

$(TOOLS)/schemathesis/.complete: cmd/keyward/testdata/schemathesis/requirements.txt
	rm -rf $(TOOLS)/schemathesis
	$(PYTHON) -m venv $(TOOLS)/schemathesis
	$(TOOLS)/schemathesis/bin/pip install --quiet --disable-pip-version-check --only-binary :all: -r $<
	touch $@

# Reads the rules and the dashboard in docs/: TestPromtool. It is taken out of Debian's package, which is not
# installed, so that no Prometheus starts. Without it the test is skipped, in CI it fails.
.PHONY: promtool
promtool:
	@command -v promtool >/dev/null || $(MAKE) --no-print-directory $(TOOLS)/promtool || { \
		echo "promtool is not to be had, so TestPromtool is skipped: it is in Debian's package prometheus"; \
		[ -z "$$CI" ]; }

$(TOOLS)/promtool:
	rm -rf $(TOOLS)/prometheus && mkdir -p $(TOOLS)/prometheus
	cd $(TOOLS)/prometheus && { apt-get download -qq prometheus 2>/dev/null || { apt-get update -qq && apt-get download -qq prometheus; }; }
	dpkg-deb -x $(TOOLS)/prometheus/prometheus_*.deb $(TOOLS)/prometheus
	mv $(TOOLS)/prometheus/usr/bin/promtool $@
	rm -rf $(TOOLS)/prometheus

clean: ## remove what was built and fetched
	rm -rf bin .tools .envoy

$(TOOLS)/golangci-lint-$(GOLANGCI_LINT_VERSION):
	mkdir -p $(TOOLS)
	GOBIN=$(TOOLS) go install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_LINT_VERSION)
	mv $(TOOLS)/golangci-lint $@
