"""The scores as functions of images, their prompts and maps: encoders, protocols, distances. Imports no runner."""
