"""Running the app with everything that it needs, and leaving nothing behind."""
