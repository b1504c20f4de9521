"""A client whose images are looked at once, with differential privacy for each of them.

What it tells in an experiment, and in all later ones, is computed from one noisy release
(`fedzge_flwr.learning.privacy`) and from what the server sends. So queries, evaluations, losses and
rounds spend nothing, however many there are.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from fedzge_flwr.black_boxes.contract import ClientProfile, FitReport, State
from fedzge_flwr.black_boxes.partition import TorchBlackBox
from fedzge_flwr.common.errors import RefusedError, StateError
from fedzge_flwr.common.files import atomic_path, make_folder
from fedzge_flwr.common.node_folder import explained, locked
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.images.image_set import ImageSet
from fedzge_flwr.images.pixels import PIXEL_RANGE
from fedzge_flwr.learning.models.gabor import GaborLinear
from fedzge_flwr.learning.numerics import exact_float32, in_batches
from fedzge_flwr.learning.privacy import epsilon_of, mu_of, released
from fedzge_flwr.learning.tensors import device_of, state_arrays, to_tensor

LOGGER = logging.getLogger("flwr.fedzge")

PRIVATE_MODEL = "gabor-linear"
"""The one model of the registry that has private training."""

_NOTHING_LEFT = 1e-3
"""Part of a budget's μ that is not worth a look."""


@dataclass(frozen=True)
class Kept:
    """A release as a model.

    Parameters
    ----------
    state : State
        All of the model: its features too, which another version of PyTorch would turn.
    num_examples : int
        How many images there are, with noise.
    """

    state: State
    num_examples: int


class Releases:
    """What a node's images have been looked at for, and what that has cost.

    Parameters
    ----------
    epsilon, delta : float
        The budget of all releases together, as their owner sets it.
    folder : Path, optional
        Keeps each release, under a lock, and on disk before anything of it leaves. Without, they
        are gone with this object: for experiments, whose images are nobody's.
    told : bool
        Whether the server may be told of ε and δ.
    """

    def __init__(
        self, epsilon: float, delta: float, folder: Path | None, *, told: bool = False
    ) -> None:
        self.told = (epsilon, delta) if told else (0.0, 0.0)
        self._epsilon = epsilon
        self._delta = delta
        self._folder = folder
        self._here: dict[str, Kept] = {}

    def get(self, purpose: str, look: Callable[[float], Kept]) -> Kept:
        """Return the release for a purpose; make it if there is none and the budget allows it.

        Parameters
        ----------
        purpose : str
            What tells it from others: which images, which model.
        look : Callable[[float], Kept]
            Makes a release of some μ.

        Raises
        ------
        RefusedError
            If the budget is spent.
        StateError
            If the folder cannot be read or written.
        """
        if purpose not in self._here:
            if self._folder is None:
                self._here[purpose] = look(mu_of(self._epsilon, self._delta))
            else:
                self._here[purpose] = self._filed(self._folder, purpose, look)
        return self._here[purpose]

    def _filed(self, folder: Path, purpose: str, look: Callable[[float], Kept]) -> Kept:
        from safetensors.numpy import save_file

        with explained(folder):
            make_folder(folder, mode=0o700)
        with explained(folder), locked(folder / "releases.lock"):
            known = [_read(path) for path in sorted(folder.glob("*.safetensors"))]
            wanted = {
                "purpose": purpose,
                "epsilon": repr(self._epsilon),
                "delta": repr(self._delta),
            }
            for about, kept in reversed(known):
                if wanted.items() <= about.items():
                    return kept
            mu = self._left([float(about["mu"]) for about, _ in known])
            kept = look(mu)
            about = {**wanted, "mu": repr(mu), "examples": str(kept.num_examples)}
            with atomic_path(folder / f"{len(known) + 1:04d}.safetensors") as temporary:
                save_file(kept.state, temporary, metadata=about)
        LOGGER.info(
            "own images were looked at, with ε = %g at δ = %g in all; kept in %s",
            *(self._epsilon, self._delta, folder),
        )
        return kept

    def _left(self, spent: list[float]) -> float:
        """Return the μ that is left: squares of μ add up (`fedzge_flwr.learning.privacy`)."""
        whole, gone = mu_of(self._epsilon, self._delta), math.hypot(*spent)
        left = math.sqrt(max(whole**2 - gone**2, 0.0))
        if left > _NOTHING_LEFT * whole:
            return left
        LOGGER.warning(
            "own images have been looked at with ε = %g at δ = %g, and 'dp-epsilon' = %g allows no "
            "more: the same settings as then have what was released",
            *(epsilon_of(gone, self._delta), self._delta, self._epsilon),
        )
        raise RefusedError("this node may tell no more of its images ('dp-epsilon')")


class PrivateBlackBox(TorchBlackBox):
    """A `TorchBlackBox` of `PRIVATE_MODEL` that looks at its images once, in `Releases`.

    It rehearses nothing, holds nothing out, and its owner's ``max-accuracy-loss`` sees no image.
    Its example count is the release's.

    Parameters
    ----------
    settings, partition, num_partitions, data_path, images, state_dir
        As for `TorchBlackBox`.
    releases : Releases
        The node's.
    """

    def __init__(
        self,
        settings: Settings,
        partition: int,
        num_partitions: int,
        releases: Releases,
        data_path: str | None = None,
        images: ImageSet | None = None,
        state_dir: str = "",
    ) -> None:
        self._releases = releases
        super().__init__(
            settings,
            partition,
            num_partitions,
            PRIVATE_MODEL,
            data_path,
            rehearsal=False,
            images=images,
            state_dir=state_dir,
        )

    @property
    def holds_out(self) -> bool:
        """Whether own images are kept for evaluation: what came of that would tell of them."""
        return False

    def profile(self) -> ClientProfile:
        """Say partition, device and the released number of examples.

        Raises
        ------
        RefusedError, StateError
            As `Releases.get`.
        """
        epsilon, delta = self._releases.told
        told = replace(super().profile(), data="", epsilon=epsilon, delta=delta)
        if self._partition >= self._settings.run.num_clients:
            return told
        # Also of a client without images, which is a neighbour of one with one.
        return replace(told, num_examples=self._kept().num_examples)

    def learns_by(self) -> dict[str, object]:
        """Return nothing: it learns by its owner's ε."""
        return {}

    def trained_on(self) -> ImageSet | None:
        """Return nothing: nobody looks at the images again."""
        return None

    def fit(self, round_: int) -> FitReport:
        """Take up the release, unless that has been done; 0 examples are reported then.

        Raises
        ------
        RefusedError, StateError
            As `Releases.get`.
        """
        if bool(cast(GaborLinear, self._model).head.weight.any()):
            return FitReport(num_examples=0, loss=0.0)
        kept = self._kept()
        self.load_state({name: np.array(value) for name, value in kept.state.items()})
        return FitReport(num_examples=kept.num_examples, loss=0.0)

    def _kept(self) -> Kept:
        of_dataset = f"{self._settings.data.dataset}, {self._partition} of {self._num_partitions}"
        shape = (*self.image_shape, self.num_classes)
        purpose = f"{PRIVATE_MODEL} {shape} {self._data_path or of_dataset}"
        return self._releases.get(purpose, self._looked)

    def _looked(self, mu: float) -> Kept:
        """Look at the images."""
        own = super().trained_on()
        assert own is not None
        model = cast(GaborLinear, self._built_anew())
        levels_NCHW = to_tensor(own.images_NCHW)

        @torch.inference_mode()
        def features(rows: slice) -> Tensor:
            with exact_float32():
                moved = levels_NCHW[rows].to(device_of(model))
                return model.features(PIXEL_RANGE.from_uint8(moved)).cpu()

        size = self._settings.queries.query_batch_size
        features_NE = torch.cat(in_batches(features, len(own), size)).double().numpy()
        found = released(features_NE, own.labels_N, self.num_classes, mu)
        state = {name: np.ascontiguousarray(value) for name, value in state_arrays(model).items()}
        state["head.weight"] = found.weights_KE.astype(np.float32)
        return Kept(state, found.num_examples)


def _read(path: Path) -> tuple[dict[str, str], Kept]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
        mu, examples = float(about["mu"]), int(about["examples"])
        if not (math.isfinite(mu) and mu > 0 and examples > 0):
            raise ValueError(f"mu {mu}, {examples} examples")
    except (SafetensorError, KeyError, ValueError) as error:
        # What cannot be read is not taken for none: a budget must not begin anew.
        raise StateError(
            f"{path} is not a release ({error}): it tells what this client's images have been "
            "looked at for; restore it"
        ) from error
    return about, Kept(state, examples)
