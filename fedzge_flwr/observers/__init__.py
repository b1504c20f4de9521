"""Who follows a run: the run folder, its pictures, TensorBoard."""
