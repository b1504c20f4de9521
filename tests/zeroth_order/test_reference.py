"""The golden numbers: the objective and the paper's estimator, through the run's own functions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedzge_flwr.learning.losses import LossTerms, ObjectiveWeights, generator_objective
from fedzge_flwr.query.directions import Directions
from fedzge_flwr.query.question import Question
from fedzge_flwr.zeroth_order.batch_difference import BatchDifference
from fedzge_flwr.zeroth_order.chain_rule import exact_parts
from fedzge_flwr.zeroth_order.samplers import sphere
from tests.helpers.asked import copies_of

FOLDER = Path(os.environ.get("FEDZGE_REFERENCE", Path(__file__).parent / "reference"))
FILES = sorted(FOLDER.glob("*.npz"))
TOLERANCE = 1e-9


class Reference:
    def __init__(self, path: Path) -> None:
        with np.load(path) as data:
            self.arrays: dict[str, Any] = {key: torch.from_numpy(data[key]) for key in data.files}
        self.weights = ObjectiveWeights(
            temperature=float(self["temperature"]),
            beta1=float(self["beta1"]),
            beta2=float(self["beta2"]),
            beta3=float(self["beta3"]),
        )

    def __getitem__(self, key: str) -> Tensor:
        return self.arrays[key]

    def objective(self, x: Tensor, ensemble_logits: Tensor, central_logits: Tensor) -> LossTerms:
        return generator_objective(
            x, self["z"], self["y"].long(), ensemble_logits, central_logits, self.weights
        )

    chunk = 16

    def terms(
        self, images_NCHW: Tensor, ensemble_logits_NK: Tensor, central_logits_NK: Tensor
    ) -> LossTerms:
        return self.objective(images_NCHW, ensemble_logits_NK, central_logits_NK)

    def surrogate_logits(self, images_NCHW: Tensor) -> Tensor:
        return self.central_logits(images_NCHW)

    def queries(self) -> Question:
        """The recorded directions in the float64 that they were recorded in: none that travel."""
        num_directions, num_images, channels, height, width = self["u"].shape
        placeholder = Directions.from_seed(num_directions, num_images, (channels, height, width), 0)
        queries = Question(self["x"].numpy(), placeholder, float(self["eps"]))
        queries.__dict__["directions_QNCHW"] = self["u"].numpy()
        return queries

    def central_logits(self, x: Tensor) -> Tensor:
        linear = x.flatten(1) @ self["W_server"].T + self["b_server"]
        return linear + 0.5 * torch.sin(linear - self["b_server"])

    def ensemble(self, x: Tensor) -> Tensor:
        clients = [
            weight * (4.0 * torch.tanh(x.flatten(1) @ matrix.T) + bias)
            for weight, matrix, bias in zip(
                self["client_weights"], self["W_clients"], self["b_clients"], strict=True
            )
        ]
        return torch.stack(clients).sum(dim=0)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == torch.float64
    assert float((found - wanted).norm() / wanted.norm()) <= TOLERANCE


def test_reference_files_exist() -> None:
    assert FILES, f"no .npz in {FOLDER}: set FEDZGE_REFERENCE"


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def reference(request: pytest.FixtureRequest) -> Reference:
    return Reference(request.param)


def test_reference_loss_terms(reference: Reference) -> None:
    terms = reference.objective(
        reference["x"], reference["ensemble_logits"], reference["server_logits"]
    )
    assert_close(terms["fidelity"], reference["loss_fid"])
    assert_close(terms["adversarial"], reference["loss_adv"])
    assert_close(terms["diversity"], reference["loss_div"])
    assert_close(terms["information"], reference["loss_info"])
    assert_close(terms["total"], reference["loss_total"])


def test_reference_perturbed_totals(reference: Reference) -> None:
    queries = reference.queries()
    totals = [
        reference.objective(x, logits, central)["total"]
        for x, logits, central in zip(
            copies_of(queries)[1:],
            reference["ensemble_logits_q"],
            reference["server_logits_q"],
            strict=True,
        )
    ]
    assert_close(torch.stack(totals), reference["loss_total_q"])


def test_reference_forward_difference(reference: Reference) -> None:
    estimator = BatchDifference(sphere, len(reference["u"]), float(reference["eps"]))
    queries = reference.queries()
    answers = torch.cat((reference["ensemble_logits"][None], reference["ensemble_logits_q"]))
    estimate = estimator.tell(queries, answers, reference)
    # ε of 1e-3 takes the difference of two totals that agree to 4 digits, and the reference was
    # summed in another order: its own rounding stays below the tolerance.
    assert_close(estimate.gradient_NCHW, reference["grad_forward_difference"])


def test_reference_exact_parts(reference: Reference) -> None:
    """The direct part and the clients' part by the chain rule are the exact gradient."""
    x = reference["x"].clone().requires_grad_()
    ensemble_logits = reference.ensemble(x)
    parts = exact_parts(reference, reference["x"], ensemble_logits.detach())
    (clients,) = torch.autograd.grad(ensemble_logits, x, parts.by_logits_NK)
    assert_close(parts.direct_NCHW + clients, reference["grad_exact"])


def test_reference_exact_gradient(reference: Reference) -> None:
    x = reference["x"].clone().requires_grad_()
    reference.objective(x, reference.ensemble(x), reference.central_logits(x))["total"].backward()
    assert x.grad is not None
    assert_close(x.grad, reference["grad_exact"])
