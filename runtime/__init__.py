"""Bundle to pictures, on ONNX Runtime, OpenVINO, TensorRT or TensorRT-RTX; never imports torch."""
