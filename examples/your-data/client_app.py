"""A client with images from flwr-datasets."""

from flwr.app import Context
from flwr.clientapp import ClientApp
from task import SHAPE, client_images, settings, test_images

from fedzge_flwr import MODELS, ModuleBlackBox, register_endpoints

app = ClientApp()


def black_box(context: Context) -> ModuleBlackBox:
    """Return the node's model on the node's images."""
    images, classes = client_images(context), int(context.run_config["num-classes"])
    return ModuleBlackBox(
        context,
        MODELS["cnn"](SHAPE, classes),
        None,  # trained on its own images as the settings say
        SHAPE,
        classes,
        len(images),
        own=images,
        evaluation={"test": test_images(context)},
        settings=settings(context),
    )


register_endpoints(app, black_box)
