"""Images from the Hugging Face Hub, or a folder of the same form, divided among the clients."""

from functools import lru_cache

import numpy as np
from flwr.app import Context
from flwr_datasets import FederatedDataset
from flwr_datasets.partitioner import DirichletPartitioner
from PIL import Image

from fedzge_flwr import ImageSet, Settings, make_settings

SIDE = 28
SHAPE = (1, SIDE, SIDE)


def settings(context: Context) -> Settings:
    """Return what server and clients go by alike."""
    run = context.run_config
    return make_settings(
        image_shape=SHAPE,
        num_classes=int(run["num-classes"]),
        num_clients=int(run["num-clients"]),
        num_server_rounds=int(run["num-server-rounds"]),
        synthetic_batch_size=int(run["images-a-round"]),
        local_epochs=int(run["local-epochs"]),
        client_evaluation="test",
    )


@lru_cache(maxsize=1)
def federated(name: str, num_clients: int) -> FederatedDataset:
    """Open the data set once in a process."""
    split = DirichletPartitioner(num_clients, "label", alpha=1.0, min_partition_size=10, seed=0)
    return FederatedDataset(dataset=name, partitioners={"train": split})


def as_images(rows) -> ImageSet:
    """Turn rows with columns "image" and "label" into grey images of one size."""
    pictures = [row["image"].convert("L").resize((SIDE, SIDE), Image.BILINEAR) for row in rows]
    return ImageSet(
        np.stack([np.asarray(picture, dtype=np.uint8) for picture in pictures])[:, None],
        np.asarray([row["label"] for row in rows], dtype=np.int64),
    )


def client_images(context: Context) -> ImageSet:
    """Return the training images of a node."""
    node, name = context.node_config, str(context.run_config["dataset"])
    data = federated(name, int(node["num-partitions"]))
    return as_images(data.load_partition(int(node["partition-id"])))


def test_images(context: Context) -> ImageSet:
    """Return the test images, the same for everyone."""
    name = str(context.run_config["dataset"])
    return as_images(federated(name, int(context.run_config["num-clients"])).load_split("test"))
