"""Runs as files of settings: the paper's round, and the published experiments on it."""
