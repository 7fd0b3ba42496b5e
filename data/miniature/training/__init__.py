"""Training of the miniature family: ``python -m data.miniature.training``. Slow without a GPU."""
