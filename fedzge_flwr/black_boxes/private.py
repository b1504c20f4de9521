"""A client whose images are looked at once, with differential privacy for each of them.

What it tells in an experiment, and in all later ones, is computed from one noisy release
(`fedzge_flwr.learning.privacy`) and from what the server sends. So queries, evaluations, losses and
rounds spend nothing, however many there are.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn

from fedzge_flwr.black_boxes.contract import ClientProfile, FitReport, State
from fedzge_flwr.black_boxes.partition import TorchBlackBox
from fedzge_flwr.common.errors import RefusedError, StateError
from fedzge_flwr.common.files import atomic_path, make_folder, remove_remains
from fedzge_flwr.common.node_folder import explained, locked
from fedzge_flwr.common.notices import warn_once
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

_ROUNDING = 1e-9
"""Part of a budget's μ by which releases that use it up may seem to exceed it."""

_MARK = "release"
"""What a state has beside its model: which release it came of."""

_RELEASE_FILE = re.compile(r"\d{4}\.safetensors")


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

    def mark(self) -> bytes:
        """Return the SHA-256 of it, which no other release has: noise is in it."""
        digest = hashlib.sha256(b"%d" % self.num_examples)
        for name in sorted(self.state):
            digest.update(name.encode() + np.asarray(self.state[name], order="C").tobytes())
        return digest.digest()


_Entries: TypeAlias = "list[tuple[dict[str, str], Kept]]"


class Releases:
    """What a node's images have been looked at for, and what that has cost.

    A look uses up what is left of the budget. So there is another one after the owner has raised
    it, and none before.

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
        self._here: _Entries = []

    def get(self, purpose: str, images: str, look: Callable[[float], Kept]) -> Kept:
        """Return the release for a purpose; make it if the budget allows it.

        Parameters
        ----------
        purpose : str
            What tells it from others: which images, by name, and which model.
        images : str
            What tells the images from others (`ImageSet.digest`). It is kept with the release, for
            its owner: under one name there may be others later.
        look : Callable[[float], Kept]
            Makes a release of some μ.

        Raises
        ------
        RefusedError
            If the budget is spent on other purposes or images, or exceeded.
        StateError
            If the folder cannot be read or written, or lacks a release.
        """
        with self._known() as known:
            left = self._left(known)
            if left == 0.0:
                return self._had(known, purpose, images)
            kept = look(left)
            about = {
                "purpose": purpose,
                "images": images,
                "epsilon": repr(self._epsilon),
                "delta": repr(self._delta),
                "mu": repr(left),
                "examples": str(kept.num_examples),
            }
            self._add(known, about, kept)
        return kept

    def came_of(self, mark: bytes, purpose: str) -> bool:
        """Say whether a mark is that of what `get` has for a purpose; no image is read for it.

        Raises
        ------
        StateError
            As `get`.
        """
        with self._known() as known:
            if self._folder is None and not known:
                # An audit's model, of a look that is kept nowhere else.
                return True
            of_purpose = [one for one in known if one[0]["purpose"] == purpose]
            newest = {about.get("images"): kept.mark() for about, kept in of_purpose}
            needs_look = self._left(known) > 0.0
            return mark in newest.values() and not needs_look and not self._exceeded(known)

    @contextmanager
    def _known(self) -> Iterator[_Entries]:
        """Give all releases, oldest first, to one process at a time."""
        if self._folder is None:
            yield self._here
            return
        with explained(self._folder):
            make_folder(self._folder, mode=0o700)
        with explained(self._folder), locked(self._folder / "releases.lock"):
            yield [_read(path) for path in _files(self._folder)]

    def _add(self, known: _Entries, about: dict[str, str], kept: Kept) -> None:
        from safetensors.numpy import save_file

        known.append((about, kept))
        if self._folder is None:
            return
        # None has this number: those before it are all there.
        with atomic_path(_file(self._folder, len(known))) as temporary:
            save_file(kept.state, temporary, metadata=about)
        remove_remains(self._folder)
        LOGGER.info(
            "own images were looked at, with ε = %g at δ = %g in all; kept in %s",
            *(self._epsilon, self._delta, self._folder),
        )

    def _left(self, known: _Entries) -> float:
        """Return the μ of a look, 0 for none: squares of μ add up."""
        whole, gone = mu_of(self._epsilon, self._delta), _spent(known)
        left = math.sqrt(max(whole**2 - gone**2, 0.0))
        return left if left > _NOTHING_LEFT * whole else 0.0

    def _exceeded(self, known: _Entries) -> bool:
        """Say whether more has been told than the owner allows now: ε would be untrue."""
        return _spent(known) > mu_of(self._epsilon, self._delta) * (1 + _ROUNDING)

    def _had(self, known: _Entries, purpose: str, images: str) -> Kept:
        """Return the newest release of these images, without a look."""
        of_purpose = [one for one in known if one[0]["purpose"] == purpose]
        of_images = [kept for about, kept in of_purpose if about.get("images") == images]
        exceeded = self._exceeded(known)
        if of_images and not exceeded:
            return of_images[-1]
        gone = epsilon_of(_spent(known), self._delta)
        if of_purpose and not exceeded:
            LOGGER.warning(
                "own images are not those that were looked at with ε = %g at δ = %g (other files "
                "or classes, or another 'seed', 'partition', 'alpha' or 'num-train-images' of the "
                "run): bring those back, or raise 'dp-epsilon' for a look at these",
                *(gone, self._delta),
            )
        else:
            LOGGER.warning(
                "own images have been looked at with ε = %g at δ = %g, and 'dp-epsilon' = %g "
                "allows no more: the same settings as then have what was released",
                *(gone, self._delta, self._epsilon),
            )
        # For the server, and so the same line for both.
        raise RefusedError("this node may tell no more of its images ('dp-epsilon')")


class PrivateBlackBox(TorchBlackBox):
    """A `TorchBlackBox` of `PRIVATE_MODEL` that looks at its images once, in `Releases`.

    It begins with the release, and answers from that and from what it has distilled since. It
    rehearses nothing, holds nothing out, and its owner's ``max-accuracy-loss`` sees no image. Its
    example count is the release's.

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
        self._mark = b""
        self._has_trained = False
        self._begins_anew = False
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
        """Report the release, with which the model began, once; then 0 examples.

        Raises
        ------
        RefusedError, StateError
            As `Releases.get`.
        """
        if self._has_trained:
            return FitReport(num_examples=0, loss=0.0)
        self._has_trained = True
        return FitReport(num_examples=self._kept().num_examples, loss=0.0)

    @property
    def begins_anew(self) -> bool:
        """Whether the state that it was given last was put aside for the release."""
        return self._begins_anew

    def state(self) -> State:
        """Return the model, and which release it came of.

        Raises
        ------
        RefusedError, StateError
            As `Releases.get`.
        """
        found = super().state()
        return {**found, _MARK: np.frombuffer(self._mark, np.uint8)}

    def load_state(self, state: State) -> None:
        """Take up a model that came of the release; put aside any other.

        One that was trained without privacy, or came of an earlier release, is not within the ε
        that the owner has now. Whether a model has been changed does not tell that.

        Raises
        ------
        StateError
            As `Releases.get`.
        """
        arrays = dict(state)
        mark = np.asarray(arrays.pop(_MARK, np.zeros(0, np.uint8))).tobytes()
        self._begins_anew = not mark or not self._releases.came_of(mark, self._purpose)
        if self._begins_anew:
            warn_once(
                f"a kept model put aside: {self._purpose}",
                "the model that was kept does not come of what 'dp-epsilon' allows now: the client "
                "goes on from the release, without what it had distilled",
            )
            self._built, self._has_trained = None, False
            return
        # Not where a distillation is undone, which may come before training.
        self._has_trained |= self._built is None
        super().load_state(arrays)
        self._mark = mark

    def _built_anew(self) -> nn.Module:
        """Build what the release is: a private client has no other model to begin with."""
        kept = self._kept()
        super().load_state({name: np.array(value) for name, value in kept.state.items()})
        self._mark = kept.mark()
        assert self._built is not None
        return self._built

    @property
    def _purpose(self) -> str:
        of_dataset = f"{self._settings.data.dataset}, {self._partition} of {self._num_partitions}"
        shape = (*self.image_shape, self.num_classes)
        return f"{PRIVATE_MODEL} {shape} {self._data_path or of_dataset}"

    @cached_property
    def _digest(self) -> str:
        """What tells the images, in their classes, from others."""
        own = super().trained_on()
        assert own is not None
        return own.digest()

    def _kept(self) -> Kept:
        return self._releases.get(self._purpose, self._digest, self._looked)

    def _looked(self, mu: float) -> Kept:
        """Look at the images."""
        own = super().trained_on()
        assert own is not None
        model = cast(GaborLinear, super()._built_anew())
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


def _spent(known: _Entries) -> float:
    """Return the μ of all releases together (`fedzge_flwr.learning.privacy`)."""
    return math.hypot(*(float(about["mu"]) for about, _ in known))


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:04d}.safetensors"


def _files(folder: Path) -> list[Path]:
    """Return the files of all releases, oldest first.

    Raises
    ------
    StateError
        If one is gone: what it has cost is not known, and a budget must not begin anew.
    """
    # Hidden is what a writer that was killed has left: nobody was told of that.
    found = sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("."))
    for path in found:
        if not _RELEASE_FILE.fullmatch(path.name):
            raise StateError(
                f"{path} is not called as a release is ({_file(folder, 1).name} is the first): "
                "give it back the name that it had, or move a copy elsewhere"
            )
    for number, path in enumerate(found, start=1):
        if path != (wanted := _file(folder, number)):
            raise StateError(
                f"{wanted} is gone: it tells what this client's images have been looked at for; "
                "restore it"
            )
    return found


def _read(path: Path) -> tuple[dict[str, str], Kept]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
        purpose, mu, examples = about["purpose"], float(about["mu"]), int(about["examples"])
        if not (purpose and math.isfinite(mu) and mu > 0 and examples > 0):
            raise ValueError(f"mu {mu}, {examples} examples")
    except (SafetensorError, KeyError, ValueError) as error:
        # What cannot be read is not taken for none: a budget must not begin anew.
        raise StateError(
            f"{path} is not a release ({error}): it tells what this client's images have been "
            "looked at for; restore it"
        ) from error
    return about, Kept(state, examples)
