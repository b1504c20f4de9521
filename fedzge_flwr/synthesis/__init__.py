"""Where images come from and are kept; nothing here has seen a real one."""
