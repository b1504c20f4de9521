"""What every room may import, and what imports nothing of this package."""
