"""Engines for NVIDIA GPUs: built from a bundle's graphs, and run by the same loop."""
