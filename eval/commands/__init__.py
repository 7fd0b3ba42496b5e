"""The commands of ``python -m eval``, one file each with ``add_arguments(parser)`` and ``run(options)``."""
