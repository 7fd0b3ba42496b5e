"""Scores and protocols for generated images, benchmarks, studies. Imports only the leaves of the library."""
