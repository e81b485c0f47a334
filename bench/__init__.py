"""Measures a bundle: ``hart-bench``."""

REFERENCES = EAGER, COMPILED = "torch-eager", "torch-compile"
"""The references that a bundle can be measured against."""
