"""Loading data sets and dividing them among clients. No server-side module imports this package."""

from fedzge_flwr.data.loading import load_split
from fedzge_flwr.data.own import load_own, own_data
from fedzge_flwr.data.partition import ClientData, client_data, partition_indices
from fedzge_flwr.images import ImageSet

__all__ = [
    "ClientData",
    "ImageSet",
    "client_data",
    "load_own",
    "load_split",
    "own_data",
    "partition_indices",
]
