"""What `benchmarks.gradient_fidelity` measures on: clients, central models and images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedzge_flwr.black_boxes.partition import TorchBlackBox
from fedzge_flwr.common.files import atomic_path
from fedzge_flwr.common.randomness import Purpose, torch_stream
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.data.loading import load_split
from fedzge_flwr.images.pixels import PIXEL_RANGE
from fedzge_flwr.learning.losses import distillation_loss
from fedzge_flwr.learning.models.catalogue import rebuild_model
from fedzge_flwr.learning.numerics import select_device
from fedzge_flwr.learning.predict import predict
from fedzge_flwr.server.build import build_central, build_generator, build_objective
from fedzge_flwr.server.phases import draw_noise
from fedzge_flwr.server.round import SyntheticBatch
from fedzge_flwr.synthesis.procedural import procedural_images

STAGES = ("fresh", "half", "trained")
IMAGES = ("generator", "procedural", "test")
HALF = 0.5
"""Agreement with the ensemble on test images from which a central model counts as half-trained.
Test images here choose the moment to measure at, and teach nothing."""

_LR, _BATCH, _CHECK_EVERY = 1e-3, 100, 5
State: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Effort:
    """How much is trained before anything is measured.

    Parameters
    ----------
    transfer_images : int
        Procedural images that the central model is distilled on.
    central_steps : int
        Minibatch steps to "trained"; "half" is where agreement first reaches `HALF`.
    generator_steps : int
        Steps of the generator against the central model, which stands in for the ensemble.
    """

    transfer_images: int
    central_steps: int
    generator_steps: int


class Ensemble(nn.Module):
    """The clients' models, weighted by training examples; differentiable, to know the truth by."""

    def __init__(self, models: list[nn.Module], examples: list[int]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models).eval().requires_grad_(False)
        self.weights = [count / sum(examples) for count in examples]

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return next(self.models.parameters()).device

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Map images to the ensemble's logits."""
        logits = [w * m(images_NCHW) for w, m in zip(self.weights, self.models, strict=True)]
        total: Tensor = torch.stack(logits).sum(dim=0)
        return total


def cached(path: Path | None, make: Callable[[], State]) -> State:
    """Return the tensors in a file, made first if they are not there yet."""
    if path is None:
        return make()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            save_file({name: t.contiguous() for name, t in make().items()}, temporary)
    return load_file(path)


def train_ensemble(settings: Settings, cache: Path | None) -> Ensemble:
    """Train each client on its own partition, as in the first round of a run."""
    spec, models, examples = settings.data.spec, [], []
    for partition in range(settings.run.num_clients):
        box = TorchBlackBox(settings, partition, settings.run.num_clients)

        def fitted(box: TorchBlackBox = box) -> State:
            box.fit(1)
            return {name: torch.from_numpy(array) for name, array in box.state().items()}

        path = cache / f"client-{settings.run.seed}-{partition}.safetensors" if cache else None
        name = settings.training.model_of(partition)
        models.append(rebuild_model(name, spec.image_shape, spec.num_classes, cached(path, fitted)))
        examples.append(box.profile().num_examples)
    ensemble = Ensemble(models, examples)
    return ensemble.to(select_device(settings.run.client_device))


def agreement(first: nn.Module, second: nn.Module, images_NCHW: Tensor) -> float:
    """Return the share of images on which two models' most likely classes are the same."""
    classes = [predict(model, images_NCHW, 500).argmax(dim=1) for model in (first, second)]
    return float((classes[0] == classes[1]).double().mean())


def train_central(
    settings: Settings, effort: Effort, ensemble: Ensemble, cache: Path | None
) -> dict[str, nn.Module]:
    """Distill the ensemble's answers on procedural images into a central model; keep three stages.

    Returns
    -------
    dict[str, nn.Module]
        By stage, in evaluation mode.
    """
    seed, spec = settings.run.seed, settings.data.spec

    def stages() -> State:
        central = build_central(settings).to(ensemble.device)
        kept = {"fresh": _copy(central)}
        stream = torch_stream(seed, Purpose.LATENT, round_=1)
        x_NCHW = procedural_images(effort.transfer_images, spec.image_shape, stream)
        x_NCHW = x_NCHW.to(ensemble.device)
        teacher_NK = predict(ensemble, x_NCHW, 500)
        test = test_images(settings)
        optimizer = torch.optim.Adam(central.parameters(), lr=_LR)
        for step in range(1, effort.central_steps + 1):
            chosen = torch.randint(len(x_NCHW), (_BATCH,), generator=stream)
            central.train()
            optimizer.zero_grad()
            temperature = settings.distillation.temperature
            distillation_loss(teacher_NK[chosen], central(x_NCHW[chosen]), temperature).backward()
            optimizer.step()
            due = "half" not in kept and step % _CHECK_EVERY == 0
            if due and agreement(central, ensemble, test) >= HALF:
                kept["half"] = _copy(central)
        kept["trained"] = _copy(central)
        # A student that never got so far is as far as it got.
        kept.setdefault("half", _copy(central))
        return {f"{stage}|{name}": t for stage, state in kept.items() for name, t in state.items()}

    tensors = cached(cache / f"central-{seed}.safetensors" if cache else None, stages)
    name = settings.distillation.central_model
    return {
        stage: rebuild_model(
            name,
            spec.image_shape,
            spec.num_classes,
            {key.split("|")[1]: t for key, t in tensors.items() if key.startswith(f"{stage}|")},
        )
        .to(ensemble.device)
        .eval()
        for stage in STAGES
    }


def _copy(model: nn.Module) -> State:
    return {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}


def test_images(settings: Settings) -> Tensor:
    """Return the test images in the shared pixel range."""
    return PIXEL_RANGE.from_uint8(torch.tensor(load_split(settings.data, "test").images_NCHW))


def train_generator(settings: Settings, effort: Effort, central: nn.Module) -> State:
    """Train a generator a little, the central model standing in for the clients."""
    device = next(central.parameters()).device
    generator = build_generator(settings).to(device)
    optimizer = torch.optim.Adam(generator.parameters(), lr=settings.images.generator_lr)
    objective = build_objective(settings)
    for step in range(effort.generator_steps):
        stream = torch_stream(settings.run.seed, Purpose.LATENT, round_=2 + step)
        drawn = draw_noise(settings, settings.images.synthetic_batch_size, stream)
        batch = drawn[0].to(device), drawn[1].to(device)
        x_NCHW = generator(*batch)
        logits_NK = central(x_NCHW)
        loss = objective(x_NCHW, *batch, logits_NK, logits_NK.detach())["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return _copy(generator)


def images_for(
    settings: Settings, effort: Effort, stage: str, central: nn.Module, cache: Path | None
) -> Images:
    """Return the images to try one stage's central model on."""
    path = cache / f"generator-{settings.run.seed}-{stage}.safetensors" if cache else None
    generator = build_generator(settings)
    generator.load_state_dict(cached(path, partial(train_generator, settings, effort, central)))
    return Images(settings, generator)


class Images:
    """Batches of each kind of image, new ones for each draw.

    Parameters
    ----------
    settings : Settings
        Sizes and seed.
    generator : nn.Module
        Trained against the central model that is measured; in training mode, as in a round.
    """

    def __init__(self, settings: Settings, generator: nn.Module) -> None:
        self._settings = settings
        self._generator = generator.train()
        self._test_MCHW = test_images(settings)

    def batch(self, kind: str, draw: int) -> SyntheticBatch:
        """Return a batch of one of `IMAGES`; noise and labels enter the objective with each."""
        settings = self._settings
        # With a partition, the streams are other ones than those that anything was trained on.
        stream = torch_stream(
            settings.run.seed, Purpose.LATENT, round_=draw, partition=IMAGES.index(kind)
        )
        z_ND, y_N = draw_noise(settings, settings.images.synthetic_batch_size, stream)
        if kind == "generator":
            with torch.no_grad():
                x_NCHW = self._generator(z_ND, y_N)
        elif kind == "procedural":
            x_NCHW = procedural_images(len(y_N), settings.data.spec.image_shape, stream)
        else:
            order = torch.randperm(len(self._test_MCHW), generator=stream)
            x_NCHW = self._test_MCHW[order[: len(y_N)]]
        return SyntheticBatch(z_ND, y_N, x_NCHW)
