"""A project on the library as type checkers see it: mypy --strict reads it, and a test runs it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from torch import Tensor, nn

from fedzge_flwr import (
    ENSEMBLES,
    ESTIMATORS,
    OBJECTIVES,
    SOURCES,
    Answers,
    Checkpoint,
    CheckpointFolder,
    Directions,
    Estimate,
    FedZGE,
    FedZGEError,
    Memories,
    ModuleBlackBox,
    Objective,
    ObjectiveWeights,
    Observer,
    Proposed,
    Queries,
    RoundRow,
    Settings,
    generator_objective,
    make_settings,
    register_endpoints,
)

SHAPE = (1, 8, 8)


def settings() -> Settings:
    """What both sides go by."""
    return make_settings(
        image_shape=SHAPE,
        num_classes=10,
        num_clients=2,
        num_server_rounds=2,
        objective="sharp",
        estimator="first-pixels",
        ensemble="first",
        q=2,
        synthetic_batch_size=20,
        generator_share=0.5,
        image_sources="blends:0.5",
        central_distill_steps=2,
        client_distill_steps=2,
        server_threads=1,
    )


def sharp(
    x: Tensor, z: Tensor, y: Tensor, ensemble: Tensor, central: Tensor, weights: ObjectiveWeights
) -> Mapping[str, Tensor]:
    """The package's objective, and the answers' sharpness."""
    terms = generator_objective(x, z, y, ensemble, central, weights)
    sharpness = ensemble.softmax(dim=1).square().sum(dim=1).mean()
    return {**terms, "sharpness": sharpness, "total": terms["total"] - sharpness}


def first(answers: Answers) -> npt.NDArray[np.float32]:
    """Listen to the first client alone."""
    return answers.logits[min(answers.logits)]


class FirstPixels:
    """The gradient by the first q pixels alone, each asked about by itself."""

    unbiased = False

    def __init__(self, sampler: object, q: int, eps: float, differences: object) -> None:
        self.q, self.eps = q, eps

    def ask(self, x: Tensor, stream: torch.Generator, objective: Objective) -> Queries:
        """Ask about a step of each of these pixels."""
        pixels = torch.eye(self.q, x[0].numel()).reshape(self.q, 1, *x.shape[1:])
        chosen = pixels.expand(self.q, *x.shape).numpy()
        return Queries(x.cpu().numpy(), Directions.ternary(chosen), self.eps)

    def tell(self, queries: Queries, logits: Tensor, objective: Objective) -> Estimate:
        """Take the answers' slopes along them, weighted by what they do to the objective."""
        x, ensemble = torch.from_numpy(queries.base_NCHW), logits[0].double().requires_grad_()
        terms = objective.terms(x.double(), ensemble, objective.central_logits(x).detach())
        (by_logits,) = torch.autograd.grad(terms["total"], ensemble)
        slopes = (queries.slopes(logits.double()) * by_logits).sum(dim=2)
        gradient = (
            slopes[:, :, None, None, None] * torch.from_numpy(queries.directions_QNCHW)
        ).sum(dim=0)
        return Estimate(gradient, {name: term.detach() for name, term in terms.items()})


def blends(
    num: int, image_shape: tuple[int, int, int], told: Memories, stream: torch.Generator
) -> Proposed:
    """Noise, blended with images of which it was told."""
    noise = torch.rand(num, *image_shape, generator=stream) * 2 - 1
    if not len(told.images):
        return Proposed(noise)
    chosen = torch.randint(len(told.images), (num,), generator=stream)
    return Proposed((noise + told.images.asked[chosen] / 127.5 - 1) / 2)


OBJECTIVES["sharp"] = sharp
ENSEMBLES["first"] = first
ESTIMATORS["first-pixels"] = FirstPixels
SOURCES["blends"] = blends


def black_box(context: Context) -> ModuleBlackBox:
    """A client."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return ModuleBlackBox(context, model, lambda _: 0.5, SHAPE, 10, 20, settings=settings())


def client_app() -> ClientApp:
    """The clients' app."""
    app = ClientApp()
    register_endpoints(app, black_box)
    return app


class Losses(Observer):
    """Keeps each round's losses."""

    def __init__(self) -> None:
        self.by_round: dict[int, dict[str, float]] = {}

    def on_round(self, server: object, current: object, row: RoundRow) -> None:
        """Keep them."""
        self.by_round[row.round] = row.loss


def newest(folder: CheckpointFolder) -> Checkpoint | None:
    """Return what there is to go on from."""
    try:
        return folder.newest()
    except FedZGEError:
        return None


def run(grid: Grid, folder: Path, losses: Losses) -> Result:
    """The server's app."""
    central = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    checkpoints = CheckpointFolder(folder)
    strategy = FedZGE(
        settings(),
        central,
        observers=[losses],
        checkpoints=checkpoints,
        resume_from=newest(checkpoints),
    )
    return strategy.start(
        grid,
        ArrayRecord(central.state_dict()),
        evaluate_fn=lambda round_, arrays: MetricRecord({"accuracy": 0.5}),
    )
