"""Datasets, prompt lists and small models to run on. Imports nothing of the library."""
