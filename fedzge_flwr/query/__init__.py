"""What is asked: questions, directions and targets. NumPy only, for both sides of the wire."""
