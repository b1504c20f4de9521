"""The version, once; `pyproject.toml` repeats it, and a test compares the two."""

__version__ = "0.1.0"
"""The version of this package, as a client tells it in its hello."""
