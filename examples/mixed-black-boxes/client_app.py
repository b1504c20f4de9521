"""Four clients with four kinds of models, each behind the same endpoints."""

import torch
from flwr.app import Context
from flwr.clientapp import ClientApp
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from task import IMAGE_SHAPE, NUM_CLASSES, all_images, client_images

from fedzge_flwr import (
    MODELS,
    BlackBox,
    ModuleBlackBox,
    OnnxBlackBox,
    SklearnBlackBox,
    make_settings,
    register_endpoints,
)

app = ClientApp()


def black_box(context: Context) -> BlackBox:
    """Return the model of the node that the context belongs to."""
    partition = int(context.node_config["partition-id"])
    images = client_images(partition, float(context.run_config["alpha"]))
    evaluation = {"test": all_images()[1]}
    if partition == 0:
        torch.manual_seed(0)
        return ModuleBlackBox(
            context,
            MODELS["resnet18"](IMAGE_SHAPE, NUM_CLASSES),
            None,  # trained on its own images as the settings say
            IMAGE_SHAPE,
            NUM_CLASSES,
            len(images),
            own=images,
            evaluation=evaluation,
            # A step of a ResNet-18 takes a quarter of a second on one core.
            settings=make_settings(client_distill_steps=200),
        )
    if partition == 3:
        # Made by make_onnx.py, once: it answers and never changes.
        file = str(context.run_config["onnx-file"])
        return OnnxBlackBox(
            context, file, IMAGE_SHAPE, NUM_CLASSES, len(images), evaluation=evaluation
        )
    classifier = (
        RandomForestClassifier(200, random_state=0, n_jobs=1)
        if partition == 1
        else HistGradientBoostingClassifier(max_iter=60, random_state=0)
    )
    return SklearnBlackBox(context, classifier, images, NUM_CLASSES, evaluation=evaluation)


register_endpoints(app, black_box)
