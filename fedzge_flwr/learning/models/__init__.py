"""The classifiers that the settings can name."""
