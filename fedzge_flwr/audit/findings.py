"""What an audit found, as it is kept and read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedzge_flwr.audit.extraction import Imitation, Proportions
from fedzge_flwr.audit.rates import Rate, Roc, auc, found_at, roc, true_positives
from fedzge_flwr.common.arrays import BoolArray, Float64Array, IntArray
from fedzge_flwr.common.errors import AuditError
from fedzge_flwr.common.files import atomic_write_text

FALSE_POSITIVES = (0.01, 0.001)
"""The false positive rates at which members are counted."""

_MOST_POINTS = 500


@dataclass(frozen=True)
class Attack:
    """How well one score tells members.

    Parameters
    ----------
    title : str
        Its name.
    auc : float
        The area under its curve, in [0, 1]; 0.5 is chance.
    found : Mapping[float, Rate]
        Members found, by false positive rate.
    groups : Mapping[str, Rate]
        Members found at the first of these rates, by what kind of image they are.
    curve : Roc
        Its curve, thinned.
    """

    title: str
    auc: float
    found: Mapping[float, Rate]
    groups: Mapping[str, Rate]
    curve: Roc

    @classmethod
    def of(
        cls,
        title: str,
        scores_N: Float64Array,
        member_N: BoolArray,
        groups: Mapping[str, BoolArray] | None = None,
    ) -> Attack:
        """Return the attack of scores (N,), with groups of images (N,) that are not empty."""
        curve = roc(scores_N, member_N)
        points = np.unique(np.linspace(0, len(curve.false_positive) - 1, _MOST_POINTS).astype(int))
        # Low rates are what counts: the first points are all kept.
        points = np.union1d(points, np.arange(min(_MOST_POINTS, len(curve.false_positive))))
        called_N = found_at(scores_N, member_N, FALSE_POSITIVES[0])
        rates = {}
        for name, of_group_N in (groups or {}).items():
            inside_N = of_group_N & member_N
            if inside_N.any():
                rates[name] = Rate(int((called_N & inside_N).sum()), int(inside_N.sum()))
        return cls(
            title,
            auc(scores_N, member_N),
            {most: true_positives(scores_N, member_N, most) for most in FALSE_POSITIVES},
            rates,
            Roc(curve.false_positive[points], curve.true_positive[points]),
        )

    def as_json(self) -> dict[str, Any]:
        """Return what JSON holds of it."""
        return {
            "title": self.title,
            "auc": self.auc,
            "found": {str(most): _rate(rate) for most, rate in self.found.items()},
            "groups": {name: _rate(rate) for name, rate in self.groups.items()},
            "roc": {name: values.tolist() for name, values in self.curve._asdict().items()},
        }


@dataclass(frozen=True)
class Findings:
    """All that an audit found.

    Parameters
    ----------
    about : Mapping[str, Any]
        Which client, with which images and settings.
    attacks : Sequence[Attack]
        On the client's endpoint; the first is the strongest that is known.
    control : Attack
        The first with membership drawn by lot: chance.
    proportions : Proportions
        What answers tell of the client's classes.
    imitation : Sequence[Imitation]
        What they tell of its model.
    central : Attack, optional
        On the central model, over all clients' images.
    """

    about: Mapping[str, Any]
    attacks: Sequence[Attack]
    control: Attack
    proportions: Proportions
    imitation: Sequence[Imitation]
    central: Attack | None

    @property
    def worst(self) -> Rate:
        """The members found at 1 % false positives by the attack that finds most."""
        return max((a.found[FALSE_POSITIVES[0]] for a in self.attacks), key=lambda r: r.value)

    def write(self, folder: Path) -> None:
        """Write ``audit.json``.

        Raises
        ------
        AuditError
            If it cannot be written.
        """
        whole = {
            **self.about,
            "attacks": [attack.as_json() for attack in self.attacks],
            "control": self.control.as_json(),
            "proportions": vars(self.proportions),
            "imitation": [vars(one) for one in self.imitation],
            "central": self.central and self.central.as_json(),
        }
        write_text(folder / "audit.json", json.dumps(whole, indent=1))


def write_exposed(
    folder: Path, labels_N: IntArray, scores_N: Float64Array, member_N: BoolArray
) -> None:
    """Write ``exposed.csv``: the members that are found at 1 % false positives, worst first.

    It names the owner's images by their place, and is for the owner alone.
    """
    found = np.flatnonzero(found_at(scores_N, member_N, FALSE_POSITIVES[0]) & member_N)
    lines = [
        f"{row},{labels_N[row]},{scores_N[row]:.4g}\n"
        for row in sorted(found, key=lambda row: -scores_N[row])
    ]
    write_text(folder / "exposed.csv", "image,class,score\n" + "".join(lines))


def write_text(path: Path, text: str) -> None:
    """Write a file of an audit; AuditError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, text)
    except OSError as error:
        raise AuditError(f"{path} cannot be written: {error.strerror or error}") from error


def _rate(rate: Rate) -> dict[str, Any]:
    low, high = rate.interval
    return {
        "rate": rate.value,
        "low": low,
        "high": high,
        "images": rate.hits,
        "of": rate.total,
    }
