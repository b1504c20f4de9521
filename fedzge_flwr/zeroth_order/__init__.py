"""Gradients from answers: estimators that say what to ask and read a gradient from the reply."""
