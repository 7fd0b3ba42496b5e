"""Datasets, prompt lists and small models to run on. Of the library it imports the leaves only."""
