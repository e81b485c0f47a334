"""HART in plain PyTorch: the reference that everything exported is measured against.

This package file imports nothing, so that the torch-free modules
(:mod:`hart.schedule`, :mod:`hart.diffusion_schedule`, :mod:`hart.noise`) can be
used by ``runtime/`` on machines without torch.
"""
