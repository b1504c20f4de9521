"""PyTorch of both sides: models, losses, training, distillation, prediction."""
