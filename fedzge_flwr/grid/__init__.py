"""The clients as the server sees them, over Flower's Grid. No PyTorch."""
