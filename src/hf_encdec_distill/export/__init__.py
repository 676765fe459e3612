"""From a trained student to graphs for ONNX Runtime, OpenVINO and Core ML, each proven equal to PyTorch."""
