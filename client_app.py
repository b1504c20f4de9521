"""FedZGE's ClientApp: the endpoints over a PyTorch model on a partition of a data set."""

from flwr.clientapp import ClientApp

from fedzge_flwr.client import register_endpoints
from fedzge_flwr.torch_blackbox import torch_black_box

app = ClientApp()
register_endpoints(app, torch_black_box)
