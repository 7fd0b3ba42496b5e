"""Reproductions of the paper's figures and tables, and further studies."""
