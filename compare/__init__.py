"""How far an exported bundle is from the reference model in PyTorch (``hart-compare``).

The ruler is :func:`hart_runtime.hart.generate.generate` in float32 on real prompts; every tensor that an
exported graph takes or returns is recorded there and replayed on the engine.
"""

TORCH_FP16 = "torch-fp16"
"""PyTorch in half precision, as if it were a backend (see :mod:`hart_runtime.compare.torch_backend`)."""
