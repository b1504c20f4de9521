"""Which sources are asked for more: those whose images the central model did not foresee.

What pays differs by data: on digits patterns, on photographs dead leaves. The answers tell. An
image teaches as much as its answer surprises, and sources whose answers surprised more make more of
the next round: a bandit whose arms are the sources (Auer et al., 2002, "Finite-time analysis of the
multiarmed bandit problem") and whose reward is what is to be learned (learning progress: Oudeyer,
Kaplan & Hafner, 2007, doi:10.1109/TEVC.2006.890271). No query is spent on it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fedzge_flwr.learning.losses import kl_divergence
from fedzge_flwr.learning.predict import predict

_BATCH = 500
_NEWEST = 0.3
_AS_GIVEN = 0.2


def surprises(
    central: nn.Module, levels_NCHW: Tensor, logits_NK: Tensor, counts: Mapping[str, int]
) -> dict[str, float]:
    """Return how much answers surprised the central model, in nats, by source.

    Parameters
    ----------
    central : nn.Module
        The central model, before it learns these answers.
    levels_NCHW : Tensor
        The images, uint8, source by source.
    logits_NK : Tensor
        The ensemble's logits on them, on the CPU.
    counts : Mapping[str, int]
        How many are of which source, in order.

    Returns
    -------
    dict of str to float
        The mean KL(ensemble ‖ central), ≥ 0, of each source that made any.
    """
    expected_NK = predict(central, levels_NCHW, _BATCH).cpu()
    sizes = list(counts.values())
    parts = zip(counts, logits_NK.split(sizes), expected_NK.split(sizes), strict=True)
    return {
        name: float(kl_divergence(ensemble_SK, central_SK, 1.0))
        for name, ensemble_SK, central_SK in parts
        if len(ensemble_SK)
    }


def noted(before: Mapping[str, float], found: Mapping[str, float]) -> dict[str, float]:
    """Return running means: three tenths are of the newest round, all of it at first."""
    return {
        **before,
        **{
            name: (1 - _NEWEST) * before.get(name, value) + _NEWEST * value
            for name, value in found.items()
        },
    }


def favoured(
    counts: Mapping[str, int], surprised: Mapping[str, float], power: float
) -> dict[str, int]:
    """Divide a round's images anew among their sources.

    A fifth stays as given, so that each source goes on being judged. The rest goes by the count
    given times surprise to a power.

    Parameters
    ----------
    counts : Mapping[str, int]
        Images by source, as the settings' shares have them.
    surprised : Mapping[str, float]
        As `noted` returns it. While a source of them has none, all stays as given.
    power : float
        0: as given; 3: twice the surprise makes eight times as many.

    Returns
    -------
    dict of str to int
        As many images in all.
    """
    if not all(surprised.get(name, 0.0) > 0 for name, count in counts.items() if count):
        return dict(counts)
    largest = max((surprised[name] for name, count in counts.items() if count), default=1.0)
    weights = {
        name: count * (surprised[name] / largest) ** power if count else 0.0
        for name, count in counts.items()
    }
    total, weight = sum(counts.values()), sum(weights.values()) or 1.0
    found = {
        name: int(_AS_GIVEN * count + (1 - _AS_GIVEN) * total * weights[name] / weight)
        for name, count in counts.items()
    }
    if found:
        found[max(weights, key=lambda name: weights[name])] += total - sum(found.values())
    return found
