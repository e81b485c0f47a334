"""Measures a bundle: ``hart-bench``."""
