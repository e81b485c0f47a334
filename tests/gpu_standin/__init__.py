"""CUDA's libraries without a device: the real ``onnxruntime-gpu`` opens, places, captures and copies on them.

No kernel computes anything. What is ONNX Runtime's own doing is real: where a node runs, what is copied,
what waits, what can be captured, how much memory is asked for. ``make test-gpu-standin`` makes the
environment and runs ``test_standin.py``.
"""
