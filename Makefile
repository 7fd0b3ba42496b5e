# `make demo`, `make studio` and `make test`; each sets up everything it needs. `make lowest` tests the bounds on versions.
UV := $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)
RUN := $(UV) run --frozen --quiet
QUICK := -q -n 2 -m "not integration and not gpu and not slow"
OLDEST_PYTHON := 3.10
NEWEST_PYTHON := 3.15
DEMO := runs/demo
SUBJECT := a photo of sks mug
PROMPTS := "$(SUBJECT) on the beach" "$(SUBJECT) in the snow" "$(SUBJECT) in the jungle" \
  "$(SUBJECT) at night" "$(SUBJECT) in a meadow" "$(SUBJECT) on a cobblestone street"

# Demo and tests start many processes; without compiled modules each compiles torch and diffusers again, for seconds.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo studio test unit setup check lowest oldest newest

setup: $(UV)
	$(UV) sync --frozen --quiet

.uv/bin/uv:
	python3 -m venv .uv
	.uv/bin/python -m pip install --quiet uv

# mini-sd, the base model that ships here, learns a toy it has never seen; its photos are rendered, since none are given.
demo: setup
	rm -rf $(DEMO)
	$(RUN) accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	  --num_cpu_threads_per_process 2 train_dreambooth_delora.py --output_dir $(DEMO)/adapter
	$(RUN) python -m delora_diffusers generate --num_images 2 --num_inference_steps 25 --batch_size 12 \
	  --prompt $(PROMPTS) --output_dir $(DEMO)/before
	$(RUN) python -m delora_diffusers generate --num_images 2 --num_inference_steps 25 --batch_size 12 \
	  --adapter $(DEMO)/adapter --prompt $(PROMPTS) --output_dir $(DEMO)/after
	$(RUN) python -m eval page --reference_dir $(DEMO)/adapter-photographs --base_dir $(DEMO)/before \
	  --generated_dir $(DEMO)/after --training_dir $(DEMO)/adapter --protocol toybox --output $(DEMO)/index.html

# The page in the browser; STUDIO="--port 8000 --workspace DIR" passes flags.
studio: $(UV)
	$(UV) sync --frozen --quiet --extra studio
	$(UV) run --frozen --quiet --extra studio python -m studio $(STUDIO)

# uv.lock must fit the bounds in requirements.txt and pyproject.toml on every Python that requires-python allows.
check: setup
	$(UV) lock --check --quiet
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) basedpyright --level error
	$(RUN) lint-imports

# The quick tier: no test that starts a process or takes seconds.
unit: setup
	$(RUN) pytest $(QUICK)

test: check unit
	$(RUN) pytest -q -n 2 -m "integration and not gpu and not slow"

# The quick tier at both ends of what requirements.txt and pyproject.toml allow, each in an environment of its own: the
# lowest versions on the oldest Python, and the newest on the newest Python for which there are wheels of torch. CUDA
# builds of torch are 3 GB to download for each. A Python is a version or a path; uv downloads a version that is missing.
lowest: oldest newest

oldest: PYTHON := $(OLDEST_PYTHON)
oldest: RESOLUTION := lowest-direct
newest: PYTHON := $(NEWEST_PYTHON)
newest: RESOLUTION := highest
oldest newest: $(UV)
	$(UV) venv --clear --quiet --python $(PYTHON) .venv-$@
	$(UV) pip install --quiet --python .venv-$@ --resolution $(RESOLUTION) -r pyproject.toml --all-extras --group dev
	.venv-$@/bin/python -m pytest $(QUICK)
