"""The commands of ``python -m delora_diffusers``, each with ``add_arguments(parser)`` and ``run(options)``."""
