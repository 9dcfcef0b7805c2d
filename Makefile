# make demo   a disk is wiped under load and comes back        (3 minutes)
# make test   lint, unit tests with -race, 1,000 random walks, tests on real kernels (30 minutes)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build

TOOLS := .cache/tools
# The one whose tests take longest is first.
PACKAGES = $(shell go list ./protocol ./... | grep -v /integration)
# What the tests run, and the Debian package it comes in.
DEPS := linux.uml=user-mode-linux modprobe=kmod dmsetup=dmsetup losetup=mount \
	mkfs.ext4=e2fsprogs e2fsck=e2fsprogs mkfs.xfs=xfsprogs xfs_repair=xfsprogs era_dump=thin-provisioning-tools \
	systemctl=systemd udevadm=udev fio=fio ip=iproute2 etcd=etcd-server
# What demo and benchmarks do without.
TEST_DEPS := mdadm=mdadm qemu-system-x86_64=qemu-system-x86 modprobe=kmod dpkg-deb=dpkg xz=xz-utils clang=clang llvm-strip=llvm \
	rpm=rpm man=man-db mandoc=mandoc zsh=zsh fish=fish \
	corosync=corosync pacemakerd=pacemaker crm_mon=pacemaker-cli-utils ocf-tester=resource-agents xmllint=libxml2-utils \
	$(or $(firstword $(wildcard /usr/lib/postgresql/*/bin/postgres)),postgres)=postgresql \
	rpc.nfsd=nfs-kernel-server mount.nfs4=nfs-common arping=iputils-arping
# What benchmarks compare with and draw with. Tests do without.
BENCH_DEPS := rsync=rsync lsyncd=lsyncd nbdcopy=libnbd-bin nbdkit=nbdkit mdadm=mdadm drbdsetup=drbd-utils gnuplot=gnuplot-nox
RACE_DEPS := gcc=gcc gcc=libc6-dev
PROTO_DEPS := protoc=protobuf-compiler
# Exhaustive and in one goroutine: minutes with the race detector, and nothing
# for it to find. 'unraced' runs them.
RACE_SKIP := ^(TestReplicaSurvivesEveryFault|TestSpillSurvivesEveryFault|TestTakeOverSurvivesFaults|TestWhatCantBeReadIsTriedAgain|TestGrowSurvivesPowerCuts)$$
# Their tests load the machine's own kernel, which the race detector slows down.
FULL_SPEED := ./blockdev/attach ./blockdev/bpf
FUZZTIME ?= 20s

.PHONY: build packages demo test lint unit race unraced simulate soak integration bench bench-list bench-report fuzz deps uml-deps generate proto proto-check bpf bpf-check rules clean

build: # bin/blockferry
	CGO_ENABLED=0 go build -trimpath -o bin/blockferry ./cmd/blockferry

packages: $(TOOLS)/nfpm # bin/packages: .deb and .rpm. VERSION=1.2.3 if not git's, GOARCH=arm64, OUT=FOLDER
	deploy/package/build $(or $(OUT),bin/packages)

demo: uml-deps # ends in one line; not 0 on any difference
	go run ./integration/demo

test: deps lint race unraced simulate integration

SCRIPTS = $(shell git ls-files deploy/ec2 deploy/hooks deploy/ocf deploy/package integration/deps | xargs grep -lE '^\#!.*sh$$|^\# shellcheck shell')

lint: rules proto-check bpf-check $(TOOLS)/staticcheck
	@files=$$(gofmt -l $$(git ls-files '*.go')); [ -z "$$files" ] || { echo "not gofmt-ed: $$files"; exit 1; }
	go vet ./...
	$(TOOLS)/staticcheck ./...
	@integration/deps shellcheck=shellcheck
	shellcheck -x $(SCRIPTS)

rules: # who may import whom, unsafe, file sizes
	go test -count=1 ./integration/rules

unit: # without guests and without the race detector: the quick one, which 'test' does without
	go test -timeout 20m $(PACKAGES)

race:
	@integration/deps $(RACE_DEPS)
	CGO_ENABLED=1 go test -race -timeout 30m -skip '$(RACE_SKIP)' $(PACKAGES)

unraced: # what 'race' leaves out or slows down
	go test -timeout 20m -run '$(RACE_SKIP)' ./protocol
	go test -timeout 20m $(FULL_SPEED)

# One package at a time: a mount namespace that the demo or a benchmark makes holds what
# a test on this machine's own kernel has mounted just then, beyond its unmounting.
integration: # RUN=REGEXP chooses tests, LIMIT=TIME is for all of them
	BLOCKFERRY_REQUIRE_GUEST=1 go test -count=1 -p 1 -timeout $(or $(LIMIT),75m) $(if $(RUN),-run '$(RUN)') ./integration/...

bench: uml-deps # FIGURE=NAME or all, QUICK=1; without a name it lists them. RECORD=docs keeps the result there
	@integration/deps $(BENCH_DEPS)
	go run ./integration/bench $(if $(QUICK),-quick) $(if $(RECORD),-record $(RECORD)) $(FIGURE)

bench-list: # the figures that 'bench' can measure
	@go run ./integration/bench

bench-report: # measures everything and writes docs/benchmarks.md: three hours on a quiet machine
	$(MAKE) bench FIGURE=all RECORD=docs

simulate: # random walks of copies through failovers, crashes and faults; SEEDS=N, SEED=the first; MOVES=1,2,… of one, as a failure prints them
	go test -count=1 -timeout 60m -v -run '^TestSimulate$$' ./protocol -simulate-seeds $(or $(SEEDS),$(if $(MOVES),1,1000)) -simulate-seed $(or $(SEED),1) \
	  $(if $(MOVES),-simulate-moves $(MOVES))

soak: # the long forms, for hours: SEEDS=10000 of simulate, SWITCHOVERS=20 there and back, FAILOVERS=100
	$(MAKE) simulate SEEDS=$(or $(SEEDS),10000)
	BLOCKFERRY_ROUNDS=$(or $(SWITCHOVERS),20) $(MAKE) integration LIMIT=3h RUN='^TestSwitchover$$'
	BLOCKFERRY_ROUNDS=$(or $(FAILOVERS),100) $(MAKE) integration LIMIT=3h RUN='^TestFailover$$'

fuzz: # each fuzz test for FUZZTIME
	@go list -f '{{.ImportPath}} {{.Dir}}' ./... | while read -r package dir; do \
	  for name in $$(grep -hoE '^func Fuzz[A-Za-z0-9_]+' "$$dir"/*_test.go 2>/dev/null | cut -d' ' -f2); do \
	    echo "== $$package $$name"; go test -run '^$$' -fuzz "^$$name$$" -fuzztime $(FUZZTIME) "$$package"; \
	  done; done

deps: uml-deps $(TOOLS)/nfpm # all that 'make test' needs; the kernel for qemu is unpacked in .cache, not installed
	@integration/deps $(TEST_DEPS) $(PROTO_DEPS)
	go run ./integration/qemu/kernel

uml-deps:
	@integration/deps $(DEPS)

$(TOOLS)/%: integration/tools/go.mod integration/tools/go.sum
	cd integration/tools && CGO_ENABLED=0 GOBIN=$(CURDIR)/$(TOOLS) go install $$(go list tool | grep "/$*$$")

generate: proto bpf # all generated code

PROTOC = cd proto && PATH=$(CURDIR)/$(TOOLS):$$PATH protoc --go_out=$(1) --go_opt=paths=source_relative \
	--go-grpc_out=$(1) --go-grpc_opt=paths=source_relative blockferry.proto

proto: $(TOOLS)/protoc-gen-go $(TOOLS)/protoc-gen-go-grpc
	@integration/deps $(PROTO_DEPS)
	$(call PROTOC,.)

# Generated code must be current. protoc's own version may differ.
proto-check: $(TOOLS)/protoc-gen-go $(TOOLS)/protoc-gen-go-grpc
	@integration/deps $(PROTO_DEPS)
	@dir=$$(mktemp -d); trap 'rm -r "$$dir"' EXIT; ($(call PROTOC,"$$dir")); \
	for file in proto/*.pb.go; do \
	  diff -q -I '^// -* *	*protoc  *	*v' "$$file" "$$dir/$${file#proto/}" >/dev/null || \
	    { echo "$$file is not what blockferry.proto generates: make proto"; exit 1; }; \
	done

# The same bytes on every machine: no paths, no debugging sections, one version of clang.
CLANG_VERSION := 14
BPFCC = cd blockdev/bpf/program && clang -target bpfel -mcpu=v3 -O2 -g -Wall -Wextra -Werror -Wno-unused-parameter \
	-fdebug-prefix-map=$$PWD=. -c tracker.c -o $(1) && llvm-strip -g $(1)

bpf: # needs clang 14 and llvm-strip
	$(call BPFCC,tracker.o)

bpf-check: # the committed object must be what the source compiles to
	@if ! command -v clang >/dev/null; then echo "no clang: the programs of fine tracking not compared"; \
	elif ! clang --version | grep -q 'version $(CLANG_VERSION)\.' || ! command -v llvm-strip >/dev/null; then \
	  echo "the programs of fine tracking can't be compared: want clang $(CLANG_VERSION), as in Debian 12, and llvm-strip; this is $$(clang --version | head -1)"; exit 1; \
	else \
	  dir=$$(mktemp -d); trap 'rm -r "$$dir"' EXIT; ($(call BPFCC,"$$dir/tracker.o")); \
	  cmp "$$dir/tracker.o" blockdev/bpf/program/tracker.o || { echo "blockdev/bpf/program/tracker.o is not what tracker.c compiles to: make bpf"; exit 1; }; \
	fi

clean:
	rm -rf bin .cache
