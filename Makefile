# Two commands: `make demo` and `make test`. Each sets up everything it needs.
UV := $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)
RUN := $(UV) run --frozen --quiet
DEMO := runs/demo
# Your own photographs: make demo PHOTOS=my_dog PROMPT="a photo of sks dog"
PHOTOS := $(DEMO)/photographs
PROMPT := a photo of sks cat
SUBJECT := $(patsubst a photo of %,%,$(PROMPT))

.PHONY: demo test setup check

setup: $(UV)
	$(UV) sync --frozen --quiet

.uv/bin/uv:
	python3 -m venv .uv
	.uv/bin/python -m pip install --quiet uv

demo: setup
	rm -rf $(DEMO)
	$(RUN) python -m data.demo_photographs $(DEMO)/photographs
	$(RUN) python -m data.tiny_sd $(DEMO)/tiny-sd
	$(RUN) python -m data.tiny_scorers $(DEMO)/tiny-scorers
	$(RUN) accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	  --num_cpu_threads_per_process 2 train_dreambooth_delora.py \
	  --pretrained_model_name_or_path $(DEMO)/tiny-sd --instance_data_dir "$(PHOTOS)" --instance_prompt "$(PROMPT)" \
	  --output_dir $(DEMO)/adapter --resolution 64 --rank 8 --train_batch_size 4 --max_train_steps 300 \
	  --validation_prompt "$(PROMPT)" --validation_steps 100 --validation_inference_steps 20
	$(RUN) python -m delora_diffusers generate --adapter $(DEMO)/adapter --num_images 4 --num_inference_steps 20 \
	  --prompt "$(PROMPT)" "$(SUBJECT) in the snow" "$(SUBJECT) on a beach" --output_dir $(DEMO)/pictures
	$(RUN) python -m eval dreambooth --generated_dir $(DEMO)/pictures --reference_dir "$(PHOTOS)" \
	  --dino local-dir:$(DEMO)/tiny-scorers/dino --clip local-dir:$(DEMO)/tiny-scorers/clip --output $(DEMO)/scores.json
	@echo
	@echo "The base model is tiny and random, so the pictures are noise and the scores mean nothing: this shows the way."
	@echo "Look at   $(DEMO)/photographs                  what it was trained on"
	@echo "          $(DEMO)/adapter/validation           the same prompt while it trained"
	@echo "          $(DEMO)/pictures/contact_sheet.png   the generated pictures"
	@echo "          $(DEMO)/scores.json                  DINO, CLIP-I, CLIP-T"
	@echo "          $(DEMO)/adapter                      the adapter, its model card and its logs"

check: setup
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) basedpyright --level error
	$(RUN) lint-imports

test: check
	$(RUN) pytest -q -n 2
