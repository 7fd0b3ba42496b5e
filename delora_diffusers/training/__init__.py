"""What both training scripts share: arguments, objective, loop, checkpoints, validation, model card."""
