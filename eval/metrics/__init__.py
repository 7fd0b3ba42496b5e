"""The scores as functions of images, their prompts and maps: encoders, protocols, distances. Runs no commands."""
