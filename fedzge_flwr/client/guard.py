"""What a node's owner allows its endpoints to answer, checked before any work is done.

A refusal is an answer of its own kind; the server goes on without the client and says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from fedzge_flwr.client.store import StateStore
from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.common.errors import RefusedError
from fedzge_flwr.config.owner import OwnerSettings


class Guard:
    """Admits queries, and perturbs what is answered.

    Rounding and noise are *output perturbation*: they make each answer tell less, and promise
    nothing. Noise averages out over repeated queries, which the budget limits; neither is
    differential privacy.

    Parameters
    ----------
    settings : OwnerSettings
        The owner's limits.
    store : StateStore
        Keeps the tally.
    clock : Callable[[], float]
        Seconds since 1970.
    """

    def __init__(
        self, settings: OwnerSettings, store: StateStore, clock: Callable[[], float] = time.time
    ) -> None:
        self._settings = settings
        self._store = store
        self._clock = clock

    def admit(self, images_BCHW: FloatArray) -> None:
        """Count a query, or refuse it; what is refused is not counted.

        It is counted before it is answered: no crash in between makes an answer free.

        Parameters
        ----------
        images_BCHW : ndarray of float32
            All images that are asked about, copies included.

        Raises
        ------
        RefusedError
            If there are too many of them, a pixel is out of range, the budget is spent, or the last
            query is too recent.
        StateError
            If the tally cannot be kept.
        """
        limits, num_images = self._settings, len(images_BCHW)
        if limits.max_query_images and num_images > limits.max_query_images:
            raise RefusedError(
                f"{num_images} images in a query; this node answers at most "
                f"{limits.max_query_images} ('max-query-images')"
            )
        if limits.query_range and num_images:
            largest = float(np.abs(images_BCHW).max())
            # Not '>': a pixel that is no number compares with nothing.
            if not largest <= limits.query_range:
                raise RefusedError(
                    f"a pixel of magnitude {largest:.3g}; this node answers up to "
                    f"{limits.query_range:g} ('query-range')"
                )
        if not (limits.query_budget or limits.min_query_interval):
            return
        with self._store.tally() as tally:
            now = self._clock()
            # A clock that was set back makes nobody wait for the difference.
            if 0 <= now - tally.last < limits.min_query_interval:
                raise RefusedError(
                    f"asked again after {now - tally.last:.3g} s; this node answers every "
                    f"{limits.min_query_interval:g} s ('min-query-interval')"
                )
            if limits.query_budget and tally.images + num_images > limits.query_budget:
                raise RefusedError(
                    f"{tally.images} images answered and {num_images} asked about; this node "
                    f"answers {limits.query_budget} in an experiment ('query-budget')"
                )
            tally.images += num_images
            tally.last = now

    def perturbed(self, logits_NK: FloatArray) -> FloatArray:
        """Return logits with noise added, then rounded, as the owner wants; float32 (N, K)."""
        noise, decimals = self._settings.logit_noise, self._settings.logit_decimals
        if noise:
            # From the system's entropy: who can replay the noise can take it off.
            drawn = np.random.default_rng().normal(scale=noise, size=logits_NK.shape)
            logits_NK = (logits_NK + drawn).astype(np.float32)
        if decimals < 0:
            return logits_NK
        # In float64, where a large logit times 10^8 does not overflow.
        return np.round(logits_NK.astype(np.float64), decimals).astype(np.float32)
