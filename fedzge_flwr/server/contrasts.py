"""The two-way table of clients' answers: what is said of each class, but for a client's own offset.

Arrays: M clients, N images, K classes. All in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from fedzge_flwr.common.arrays import Float64Array

_LEAST_TENDENCY = 1e-4
"""A class that a client never answers with still has this tendency, so that classes which no client
knows together can be compared at all."""

_CHUNK = 2**22
"""Numbers of the normal equations that are held at once."""


class Table(NamedTuple):
    """Logits with what each is worth.

    Parameters
    ----------
    logits_MNK : ndarray
        What clients answered.
    precision_MK : ndarray
        ≥ 0: a client's weight times what it knows of a class.
    share_MK : ndarray
        The same, summing to 1 for each client.
    """

    logits_MNK: Float64Array
    precision_MK: Float64Array
    share_MK: Float64Array

    @staticmethod
    def of(logits_MNK: Float64Array, weights_M: Float64Array, tendencies_MK: Float64Array) -> Table:
        """Return the table of some answers, of clients' weights ≥ 0, and of their tendencies."""
        known_MK = np.maximum(tendencies_MK, _LEAST_TENDENCY)
        share_MK = known_MK / known_MK.sum(axis=1, keepdims=True)
        return Table(logits_MNK, weights_M[:, None] * known_MK, share_MK)

    def fitted(self, trust_MN: Float64Array) -> Float64Array:
        """Return e, (N, K), that minimises Σₘ uₘₙ Σₖ pₘₖ (fₘₙₖ − eₙₖ − cₘₙ)² over e and c.

        Its mean over classes, which the table leaves open, is 0. ``trust_MN`` is u, above 0.
        """
        # Its offset eliminated, a client weighs its logits' differences from their weighted mean.
        classes = np.eye(self.precision_MK.shape[1])
        normal_MKK = self.precision_MK[:, :, None] * (classes - self.share_MK[:, None, :])
        right_MNK = _centred(self.logits_MNK, self.share_MK) * self.precision_MK[:, None]
        return np.concatenate(
            [
                _solved(trust_MN[:, rows], normal_MKK, right_MNK[:, rows])
                for rows in _chunks(*right_MNK.shape[1:])
            ]
        )

    def distances(self, fitted_NK: Float64Array) -> Float64Array:
        """Return Σₖ sₘₖ (fₘₙₖ − eₙₖ − cₘₙ)², (M, N), with each client's best offset c."""
        rest_MNK = _centred(self.logits_MNK - fitted_NK, self.share_MK)
        return np.asarray((rest_MNK**2 * self.share_MK[:, None]).sum(axis=2), dtype=np.float64)


def _centred(logits_MNK: Float64Array, share_MK: Float64Array) -> Float64Array:
    means_MN = np.einsum("mnk,mk->mn", logits_MNK, share_MK)
    return np.asarray(logits_MNK - means_MN[:, :, None], dtype=np.float64)


def _chunks(num_images: int, num_classes: int) -> Iterator[slice]:
    size = max(_CHUNK // num_classes**2, 1)
    return (slice(first, first + size) for first in range(0, num_images, size))


def _solved(
    trust_MN: Float64Array, normal_MKK: Float64Array, right_MNK: Float64Array
) -> Float64Array:
    # A product of matrices: with many clients and classes it is most of the work.
    flat_NL = trust_MN.T @ normal_MKK.reshape(len(normal_MKK), -1)
    normal_NKK = flat_NL.reshape(-1, *normal_MKK.shape[1:])
    right_NK = np.einsum("mn,mnk->nk", trust_MN, right_MNK)
    # Ones fix the mean over classes at 0.
    normal_NKK += (np.trace(normal_NKK, axis1=1, axis2=2) / normal_NKK.shape[1])[:, None, None]
    return np.asarray(np.linalg.solve(normal_NKK, right_NK[:, :, None])[:, :, 0], dtype=np.float64)
