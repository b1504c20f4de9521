"""Train the fourth client's model on its own images and write it: python make_onnx.py FILE."""

import sys

import torch
from task import IMAGE_SHAPE, SmallNet, accuracy, client_images, train

from fedzge_flwr import export_onnx

if __name__ == "__main__":
    torch.manual_seed(0)
    model = SmallNet()
    train(model, client_images(3, alpha=1.0), epochs=30)
    export_onnx(model, sys.argv[1], IMAGE_SHAPE)
    print(f"{sys.argv[1]}: {accuracy(model):.1%} on the test images")
