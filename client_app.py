"""FedZGE's ClientApp: the endpoints over a PyTorch model on a partition of a data set."""

from flwr.clientapp import ClientApp

from fedzge_flwr.black_boxes.node import torch_black_box
from fedzge_flwr.client.endpoints import register_endpoints

app = ClientApp()
register_endpoints(app, torch_black_box)
