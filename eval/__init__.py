"""Scorers and protocols for generated images. Imports ``data`` only, never the library."""
