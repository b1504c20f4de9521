"""The transfer set: what images the ensemble is asked about, and what is kept of its answers.

Nothing here has seen a real image. Plain PyTorch; no Flower, no clients.
"""
