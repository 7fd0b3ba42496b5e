"""What the training scripts share: arguments, objective, loop, checkpoints, validation, model card."""
