"""Running the app in simulation with everything that it needs, and leaving nothing behind."""
