"""Measures a bundle: ``hart-bench``."""

EAGER, COMPILED = "torch-eager", "torch-compile"
"""The references that a bundle can be measured against."""
