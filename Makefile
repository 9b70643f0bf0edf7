# make quickstart   set up, then train, evaluate and decode three hypotheses on real text (2 CPU cores: 18 minutes)
# make test         set up, then lint, types and all tests
# make test-long    more tests of the same kinds (resuming under ZeRO-1 and 2, compiled relaxed winners)
# make lint         lint and types alone
# make long-run     2,000 steps of a tiny model: memory, pace, win shares (2 minutes)
# make faults       set up, then inject faults into real runs and rewrite docs/faults.md (2 CPU cores: about 25 minutes; as root)

PYTHON ?= python3
CORES := $(shell getconf _NPROCESSORS_ONLN)
OUT ?= outputs/quickstart
BIN := .venv/bin
# Models and data sets come from local folders here; without this, each load would first ask the Hub.
RUN := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
LAUNCH := $(RUN) $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(CORES)

.PHONY: setup test lint quickstart test-long long-run faults clean

setup: .venv/.ready

# torch first and alone: other packages would pull a build for GPUs of several gigabytes.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] + ". Call make PYTHON=python3.11, say.") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv .venv || { echo "The module venv is missing: apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One process for each core, which take whole files, those with slow tests first.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(CORES) --dist loadfile --no-loadscope-reorder

test-long: setup
	$(BIN)/python -m pytest -m long

long-run: setup
	$(RUN) PYTHONPATH=. $(BIN)/python tests/long_run.py

quickstart: setup
	$(BIN)/python -m recipes.data.smollm2 | tail -n 1 > .venv/model_dir
	$(BIN)/python -m recipes.data.bible | tail -n 1 > .venv/data_dir
	$(LAUNCH) recipes/train_mcl.py --config recipes/configs/quickstart.yaml \
		--model_name_or_path "$$(cat .venv/model_dir)" --dataset_name "$$(cat .venv/data_dir)/train.jsonl" \
		--output_dir $(OUT)/mcl
	# One LoRA with as many parameters (r = 3 * 2 + 56) on the same data, for comparison.
	$(LAUNCH) recipes/train_mcl.py --config recipes/configs/quickstart.yaml \
		--model_name_or_path "$$(cat .venv/model_dir)" --dataset_name "$$(cat .venv/data_dir)/train.jsonl" \
		--num_hypotheses 1 --shared_r 0 --lora_r 62 --lora_alpha 124 --output_dir $(OUT)/lora
	$(RUN) $(BIN)/python recipes/evaluate.py --adapter $(OUT)/mcl --baseline $(OUT)/lora --mode_column version \
		--dataset_name "$$(cat .venv/data_dir)/test.jsonl" --max_sequences 360 --output $(OUT)/evaluation.json
	$(RUN) $(BIN)/python recipes/plot.py --run $(OUT)/mcl --baseline $(OUT)/lora --output $(OUT)/training.png
	$(RUN) $(BIN)/python recipes/generate.py --adapter $(OUT)/mcl --prompts_file "$$(cat .venv/data_dir)/test.jsonl" \
		--max_prompts 6 --max_new_tokens 50 --repetition_penalty 1.1 --output $(OUT)/continuations.jsonl
	@echo "Adapter: $(OUT)/mcl   figures: $(OUT)/evaluation.json   plot: $(OUT)/training.png"

# DeepSpeed is no part of the other tests.
faults: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[deepspeed]'
	$(RUN) $(BIN)/python -m tests.faults

clean:
	rm -rf .venv outputs .pytest_cache .hypothesis .mypy_cache .ruff_cache
