"""The command ``fedzge``."""
