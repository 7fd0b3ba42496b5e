"""The commands of ``python -m delora_diffusers``, a file each: ``add_arguments(parser)`` and ``run(options)``."""
