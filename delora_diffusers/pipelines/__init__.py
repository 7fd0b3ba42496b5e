"""Base models: loading a pipeline, encoding prompts, sampling images, with adapters or without."""
