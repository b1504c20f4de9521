"""The parts of `benchmarks.round_cost`."""
