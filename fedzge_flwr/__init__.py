"""FedZGE for Flower: one central model from clients that answer logit queries and nothing else.

What is listed in ``__all__`` is the library's public interface, and all of it. Each name is
imported when it is first used, so that a client never loads what is the server's.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fedzge_flwr.black_boxes.base import ClassifierBlackBox
    from fedzge_flwr.black_boxes.function import FunctionBlackBox
    from fedzge_flwr.black_boxes.module import ModuleBlackBox
    from fedzge_flwr.black_boxes.onnx import OnnxBlackBox
    from fedzge_flwr.black_boxes.scikit import SklearnBlackBox
    from fedzge_flwr.blackbox import BlackBox, ClientEvaluation, ClientProfile, FitReport
    from fedzge_flwr.checkpoints import Checkpoint, CheckpointFolder
    from fedzge_flwr.client import register_endpoints
    from fedzge_flwr.config import Settings, from_run_config, make_settings
    from fedzge_flwr.data.loading import LOADERS
    from fedzge_flwr.datasets_spec import DATASETS, DatasetSpec
    from fedzge_flwr.directions import Directions
    from fedzge_flwr.errors import FedZGEError
    from fedzge_flwr.export import export_onnx
    from fedzge_flwr.generators import GENERATORS
    from fedzge_flwr.images import ImageSet
    from fedzge_flwr.losses import OBJECTIVES, ObjectiveWeights, generator_objective
    from fedzge_flwr.models import MODELS
    from fedzge_flwr.observers import Observer, RoundRow
    from fedzge_flwr.question import COPIES
    from fedzge_flwr.results import RunFolder
    from fedzge_flwr.server.ensemble import ENSEMBLES, Answers
    from fedzge_flwr.strategy import CommonTestSet, FedZGE
    from fedzge_flwr.torch_blackbox import TorchBlackBox, torch_black_box
    from fedzge_flwr.tracking import TensorBoard
    from fedzge_flwr.zeroth_order import ESTIMATORS, Estimate, Estimator, Objective, Queries

_HOMES = {
    "black_boxes.base": ("ClassifierBlackBox",),
    "black_boxes.function": ("FunctionBlackBox",),
    "black_boxes.module": ("ModuleBlackBox",),
    "black_boxes.onnx": ("OnnxBlackBox",),
    "black_boxes.scikit": ("SklearnBlackBox",),
    "blackbox": ("BlackBox", "ClientEvaluation", "ClientProfile", "FitReport"),
    "checkpoints": ("Checkpoint", "CheckpointFolder"),
    "client": ("register_endpoints",),
    "config": ("Settings", "from_run_config", "make_settings"),
    "images": ("ImageSet",),
    "data.loading": ("LOADERS",),
    "datasets_spec": ("DATASETS", "DatasetSpec"),
    "directions": ("Directions",),
    "errors": ("FedZGEError",),
    "export": ("export_onnx",),
    "generators": ("GENERATORS",),
    "losses": ("OBJECTIVES", "ObjectiveWeights", "generator_objective"),
    "models": ("MODELS",),
    "observers": ("Observer", "RoundRow"),
    "question": ("COPIES",),
    "results": ("RunFolder",),
    "server.ensemble": ("ENSEMBLES", "Answers"),
    "strategy": ("CommonTestSet", "FedZGE"),
    "torch_blackbox": ("TorchBlackBox", "torch_black_box"),
    "tracking": ("TensorBoard",),
    "zeroth_order": ("ESTIMATORS", "Estimate", "Estimator", "Objective", "Queries"),
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
