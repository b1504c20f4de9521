"""The methods that a user would pick instead, in one app on the same data."""
