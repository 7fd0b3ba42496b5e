"""Datasets, prompt lists and small models. Imports only the library's leaf modules."""
