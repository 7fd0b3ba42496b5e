"""Adapter files: reading, writing, other tools' formats, low-rank algebra, merging, records of generated images."""
