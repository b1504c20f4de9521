"""What a client must offer, and black boxes that do: PyTorch, scikit-learn, ONNX, a function."""
