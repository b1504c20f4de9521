"""Strategies as another project makes them."""

from __future__ import annotations

from typing import Any

import torch

from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.server.build import build_central, build_generator
from fedzge_flwr.strategy import FedZGE


def make_strategy(config: dict[str, Any]) -> tuple[FedZGE, torch.nn.Module]:
    settings = from_run_config(config)
    central = build_central(settings)
    return FedZGE(settings, central, build_generator(settings)), central
