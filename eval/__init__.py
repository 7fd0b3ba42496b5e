"""Scores and protocols for generated images, whole benchmarks, studies. Of the library it imports the leaves only."""
