"""The commands of ``python -m delora_diffusers``, one file each with ``add_arguments(parser)`` and ``run(options)``."""
