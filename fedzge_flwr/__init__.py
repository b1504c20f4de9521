"""FedZGE for Flower: one central model from clients that answer logit queries and nothing else.

What is listed in ``__all__`` is the library's public interface, and all of it. Each name is
imported when it is first used, so that a client never loads what is the server's.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedzge_flwr.common.version import __version__ as __version__

if TYPE_CHECKING:
    # The same as `_HOMES`, which a test compares, for those who read without running.
    from fedzge_flwr.black_boxes.classifier import ClassifierBlackBox as ClassifierBlackBox
    from fedzge_flwr.black_boxes.contract import BlackBox as BlackBox
    from fedzge_flwr.black_boxes.contract import ClientEvaluation as ClientEvaluation
    from fedzge_flwr.black_boxes.contract import ClientProfile as ClientProfile
    from fedzge_flwr.black_boxes.contract import FitReport as FitReport
    from fedzge_flwr.black_boxes.function import FunctionBlackBox as FunctionBlackBox
    from fedzge_flwr.black_boxes.module import ModuleBlackBox as ModuleBlackBox
    from fedzge_flwr.black_boxes.node import torch_black_box as torch_black_box
    from fedzge_flwr.black_boxes.onnx import OnnxBlackBox as OnnxBlackBox
    from fedzge_flwr.black_boxes.partition import TorchBlackBox as TorchBlackBox
    from fedzge_flwr.black_boxes.scikit import SklearnBlackBox as SklearnBlackBox
    from fedzge_flwr.client.endpoints import register_endpoints as register_endpoints
    from fedzge_flwr.common.errors import FedZGEError as FedZGEError
    from fedzge_flwr.config.parsing import from_run_config as from_run_config
    from fedzge_flwr.config.parsing import make_settings as make_settings
    from fedzge_flwr.config.sections import Settings as Settings
    from fedzge_flwr.data.loading import LOADERS as LOADERS
    from fedzge_flwr.grid.at_clients import evaluate_at_clients as evaluate_at_clients
    from fedzge_flwr.images.image_set import ImageSet as ImageSet
    from fedzge_flwr.images.spec import DATASETS as DATASETS
    from fedzge_flwr.images.spec import DatasetSpec as DatasetSpec
    from fedzge_flwr.learning.calibration import best_scale as best_scale
    from fedzge_flwr.learning.calibration import fitted_scale as fitted_scale
    from fedzge_flwr.learning.calibration import losses_by_scale as losses_by_scale
    from fedzge_flwr.learning.export import export_onnx as export_onnx
    from fedzge_flwr.learning.fixed_steps import Normalized as Normalized
    from fedzge_flwr.learning.fixed_steps import Rescaled as Rescaled
    from fedzge_flwr.learning.losses import OBJECTIVES as OBJECTIVES
    from fedzge_flwr.learning.losses import ObjectiveWeights as ObjectiveWeights
    from fedzge_flwr.learning.losses import generator_objective as generator_objective
    from fedzge_flwr.learning.models.catalogue import MODELS as MODELS
    from fedzge_flwr.observers.base import Observer as Observer
    from fedzge_flwr.observers.recalls import Recalls as Recalls
    from fedzge_flwr.observers.round_row import RoundRow as RoundRow
    from fedzge_flwr.observers.run_folder import RunFolder as RunFolder
    from fedzge_flwr.observers.tensorboard import TensorBoard as TensorBoard
    from fedzge_flwr.query.copies import COPIES as COPIES
    from fedzge_flwr.query.directions import Directions as Directions
    from fedzge_flwr.query.question import Queries as Queries
    from fedzge_flwr.query.question import Question as Question
    from fedzge_flwr.server.checkpoints import Checkpoint as Checkpoint
    from fedzge_flwr.server.checkpoints import CheckpointFolder as CheckpointFolder
    from fedzge_flwr.server.ensemble import ENSEMBLES as ENSEMBLES
    from fedzge_flwr.server.ensemble import Answers as Answers
    from fedzge_flwr.strategy import CommonTestSet as CommonTestSet
    from fedzge_flwr.strategy import FedZGE as FedZGE
    from fedzge_flwr.synthesis.generators import GENERATORS as GENERATORS
    from fedzge_flwr.synthesis.memory import Memories as Memories
    from fedzge_flwr.synthesis.sources import SOURCES as SOURCES
    from fedzge_flwr.synthesis.sources import Proposed as Proposed
    from fedzge_flwr.zeroth_order.base import Estimate as Estimate
    from fedzge_flwr.zeroth_order.base import Estimator as Estimator
    from fedzge_flwr.zeroth_order.base import Objective as Objective
    from fedzge_flwr.zeroth_order.estimators import ESTIMATORS as ESTIMATORS

_HOMES = {
    "black_boxes.classifier": ("ClassifierBlackBox",),
    "black_boxes.contract": ("BlackBox", "ClientEvaluation", "ClientProfile", "FitReport"),
    "black_boxes.function": ("FunctionBlackBox",),
    "black_boxes.module": ("ModuleBlackBox",),
    "black_boxes.onnx": ("OnnxBlackBox",),
    "black_boxes.node": ("torch_black_box",),
    "black_boxes.partition": ("TorchBlackBox",),
    "black_boxes.scikit": ("SklearnBlackBox",),
    "client.endpoints": ("register_endpoints",),
    "common.errors": ("FedZGEError",),
    "config.parsing": ("from_run_config", "make_settings"),
    "config.sections": ("Settings",),
    "data.loading": ("LOADERS",),
    "grid.at_clients": ("evaluate_at_clients",),
    "images.image_set": ("ImageSet",),
    "images.spec": ("DATASETS", "DatasetSpec"),
    "learning.calibration": ("best_scale", "fitted_scale", "losses_by_scale"),
    "learning.export": ("export_onnx",),
    "learning.fixed_steps": ("Normalized", "Rescaled"),
    "learning.losses": ("OBJECTIVES", "ObjectiveWeights", "generator_objective"),
    "learning.models.catalogue": ("MODELS",),
    "observers.base": ("Observer",),
    "observers.round_row": ("RoundRow",),
    "observers.recalls": ("Recalls",),
    "observers.run_folder": ("RunFolder",),
    "observers.tensorboard": ("TensorBoard",),
    "query.copies": ("COPIES",),
    "query.directions": ("Directions",),
    "query.question": ("Queries", "Question"),
    "server.checkpoints": ("Checkpoint", "CheckpointFolder"),
    "server.ensemble": ("Answers", "ENSEMBLES"),
    "strategy": ("CommonTestSet", "FedZGE"),
    "synthesis.generators": ("GENERATORS",),
    "synthesis.memory": ("Memories",),
    "synthesis.sources": ("Proposed", "SOURCES"),
    "zeroth_order.base": ("Estimate", "Estimator", "Objective"),
    "zeroth_order.estimators": ("ESTIMATORS",),
}
"""Where each public name is defined."""

__all__ = ["__version__", *sorted(name for names in _HOMES.values() for name in names)]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
