"""Base models: load a pipeline, encode prompts and sample images, with or without adapters."""
