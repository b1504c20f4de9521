"""FedZGE for Flower: one central model from clients that answer logit queries and nothing else.

What is listed in ``__all__`` is the library's public interface, and all of it. Each name is
imported when it is first used, so that a client never loads what is the server's.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedzge_flwr.common.version import __version__

if TYPE_CHECKING:
    from fedzge_flwr.black_boxes.classifier import ClassifierBlackBox
    from fedzge_flwr.black_boxes.contract import (
        BlackBox,
        ClientEvaluation,
        ClientProfile,
        FitReport,
    )
    from fedzge_flwr.black_boxes.function import FunctionBlackBox
    from fedzge_flwr.black_boxes.module import ModuleBlackBox
    from fedzge_flwr.black_boxes.onnx import OnnxBlackBox
    from fedzge_flwr.black_boxes.partition import TorchBlackBox, torch_black_box
    from fedzge_flwr.black_boxes.scikit import SklearnBlackBox
    from fedzge_flwr.client.endpoints import register_endpoints
    from fedzge_flwr.common.errors import FedZGEError
    from fedzge_flwr.config.parsing import from_run_config, make_settings
    from fedzge_flwr.config.sections import Settings
    from fedzge_flwr.data.loading import LOADERS
    from fedzge_flwr.images.image_set import ImageSet
    from fedzge_flwr.images.spec import DATASETS, DatasetSpec
    from fedzge_flwr.learning.export import export_onnx
    from fedzge_flwr.learning.losses import OBJECTIVES, ObjectiveWeights, generator_objective
    from fedzge_flwr.learning.models.catalogue import MODELS
    from fedzge_flwr.observers.base import Observer, RoundRow
    from fedzge_flwr.observers.run_folder import RunFolder
    from fedzge_flwr.observers.tensorboard import TensorBoard
    from fedzge_flwr.query.directions import Directions
    from fedzge_flwr.query.question import COPIES
    from fedzge_flwr.server.checkpoints import Checkpoint, CheckpointFolder
    from fedzge_flwr.server.ensemble import ENSEMBLES, Answers
    from fedzge_flwr.strategy import CommonTestSet, FedZGE
    from fedzge_flwr.synthesis.generators import GENERATORS
    from fedzge_flwr.zeroth_order.base import Estimate, Estimator, Objective, Queries
    from fedzge_flwr.zeroth_order.estimators import ESTIMATORS

_HOMES = {
    "black_boxes.classifier": ("ClassifierBlackBox",),
    "black_boxes.contract": (
        "BlackBox",
        "ClientEvaluation",
        "ClientProfile",
        "FitReport",
    ),
    "black_boxes.function": ("FunctionBlackBox",),
    "black_boxes.module": ("ModuleBlackBox",),
    "black_boxes.onnx": ("OnnxBlackBox",),
    "black_boxes.partition": (
        "TorchBlackBox",
        "torch_black_box",
    ),
    "black_boxes.scikit": ("SklearnBlackBox",),
    "client.endpoints": ("register_endpoints",),
    "common.errors": ("FedZGEError",),
    "config.parsing": (
        "from_run_config",
        "make_settings",
    ),
    "config.sections": ("Settings",),
    "data.loading": ("LOADERS",),
    "images.image_set": ("ImageSet",),
    "images.spec": (
        "DATASETS",
        "DatasetSpec",
    ),
    "learning.export": ("export_onnx",),
    "learning.losses": (
        "OBJECTIVES",
        "ObjectiveWeights",
        "generator_objective",
    ),
    "learning.models.catalogue": ("MODELS",),
    "observers.base": (
        "Observer",
        "RoundRow",
    ),
    "observers.run_folder": ("RunFolder",),
    "observers.tensorboard": ("TensorBoard",),
    "query.directions": ("Directions",),
    "query.question": ("COPIES",),
    "server.checkpoints": (
        "Checkpoint",
        "CheckpointFolder",
    ),
    "server.ensemble": (
        "Answers",
        "ENSEMBLES",
    ),
    "strategy": (
        "CommonTestSet",
        "FedZGE",
    ),
    "synthesis.generators": ("GENERATORS",),
    "zeroth_order.base": (
        "Estimate",
        "Estimator",
        "Objective",
        "Queries",
    ),
    "zeroth_order.estimators": ("ESTIMATORS",),
}

__all__ = [
    "COPIES",
    "DATASETS",
    "ENSEMBLES",
    "ESTIMATORS",
    "GENERATORS",
    "LOADERS",
    "MODELS",
    "OBJECTIVES",
    "Answers",
    "BlackBox",
    "Checkpoint",
    "CheckpointFolder",
    "ClassifierBlackBox",
    "ClientEvaluation",
    "ClientProfile",
    "CommonTestSet",
    "DatasetSpec",
    "Directions",
    "Estimate",
    "Estimator",
    "FedZGE",
    "FedZGEError",
    "FitReport",
    "FunctionBlackBox",
    "ImageSet",
    "ModuleBlackBox",
    "Objective",
    "ObjectiveWeights",
    "Observer",
    "OnnxBlackBox",
    "Queries",
    "RoundRow",
    "RunFolder",
    "Settings",
    "SklearnBlackBox",
    "TensorBoard",
    "TorchBlackBox",
    "__version__",
    "export_onnx",
    "from_run_config",
    "generator_objective",
    "make_settings",
    "register_endpoints",
    "torch_black_box",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
