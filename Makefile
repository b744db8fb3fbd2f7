# Two commands do everything, packages included, on a fresh Debian 12 or 13 as root:
#   make demo    the main job on a real guest; writes target/demo/report.json
#   make test    everything CI runs
CARGO ?= cargo
BIN := target/release

.PHONY: demo test unit e2e bench lint fmt sim deps build guest lab-up lab-down clean

demo: guest
	scripts/on-lab.sh havm-demo $(BIN)/havm-e2e demo --report target/demo/report.json

test:
	scripts/test.sh

unit: deps
	$(CARGO) test --release --workspace --no-fail-fast

e2e: guest
	scripts/on-lab.sh havm-e2e $(BIN)/havm-e2e run $(ONLY)

bench: guest
	$(BIN)/havm-bench --report target/bench/report.json

# One history of the simulation:  make sim SEED=17      many:  make sim SEEDS=10000
sim:
	$(CARGO) run --release -p havm-sim -- $(if $(SEED),--seed $(SEED),--seeds $(or $(SEEDS),2000))

lint:
	$(CARGO) fmt --all -- --check
	$(CARGO) clippy --workspace --all-targets --release -- -D warnings

deps:
	scripts/deps.sh

build: deps
	$(CARGO) build --release --workspace --bins

guest: build
	$(BIN)/lab guest-image

# A protected pair to look at, kill and watch; see README.md.
lab-up: guest
	$(BIN)/havm-e2e up

lab-down:
	$(BIN)/lab down

clean: lab-down
	$(CARGO) clean
