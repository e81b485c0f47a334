"""HART in plain PyTorch: the reference that everything exported is measured against."""
