"""Scripts that print tables; run them from the repository: `python -m benchmarks.NAME`."""
