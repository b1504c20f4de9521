"""The command: what is audited, by what the command line says; what is told of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fedzge_flwr.audit.audit import Audited, audit
from fedzge_flwr.audit.findings import FALSE_POSITIVES, Findings
from fedzge_flwr.audit.page import rate_text
from fedzge_flwr.common.errors import AuditError
from fedzge_flwr.common.reading import place
from fedzge_flwr.common.text import percent
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.config.presets.catalogue import preset_file, read_settings
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.data.loading import load_split
from fedzge_flwr.data.own import load_own
from fedzge_flwr.images.image_set import ImageSet
from fedzge_flwr.learning.export import load_central
from fedzge_flwr.report.reading import read_config

TEST = "test"
"""In place of a path: the common test set."""


def audit_client(
    run_or_config: str | None,
    given: Mapping[str, Any],
    client: int,
    shadows: int,
    outside: str | None,
    node_config: Mapping[str, Any],
    folder: Path,
    fail_above: float | None,
) -> str:
    """Audit as the command line says; return what there is to tell.

    Parameters
    ----------
    run_or_config : str, optional
        A run's folder, whose central model is attacked too, or a preset's name or file.
    given : Mapping[str, Any]
        Settings that overrule those.
    client, shadows
        As in `Audited`.
    outside : str, optional
        `TEST`, or where images lie (`fedzge_flwr.data.own.load_own`).
    node_config, folder
        As in `audit`.
    fail_above : float, optional
        The most members, in [0, 1], that may be found at 1 % false positives.

    Raises
    ------
    AuditError
        If more are found, after all has been written.
    FedZGEError
        As in `audit`; or if there is no such run or preset.
    """
    config, central = _config_of(run_or_config)
    settings = from_run_config({**config, **given})
    asked = Audited(
        settings, client, shadows, _outside(settings, outside), dict(node_config), central
    )
    findings = audit(asked, folder)
    worst = findings.worst
    if fail_above is not None and worst.value > fail_above:
        raise AuditError(
            f"{rate_text(worst)} of the client's images are found at "
            f"{FALSE_POSITIVES[0]:.0%} false positives, --fail-above {fail_above:g} allows fewer; "
            f"see {folder / 'audit.html'}"
        )
    return _told(findings, folder)


def _config_of(run_or_config: str | None) -> tuple[dict[str, Any], nn.Module | None]:
    if run_or_config is None:
        return {}, None
    folder = place(run_or_config)
    if folder.is_dir():
        central = load_central(folder).model
        return dict(read_config(folder)["settings"]), central
    return dict(read_settings(preset_file(run_or_config))), None


def _outside(settings: Settings, outside: str | None) -> ImageSet | None:
    if outside is None:
        return None
    if outside == TEST:
        return load_split(settings.data, "test")
    return load_own(outside, settings.data.spec)


def _told(findings: Findings, folder: Path) -> str:
    first = FALSE_POSITIVES[0]
    lines = [
        f"{attack.title}: AUC {attack.auc:.3f}, {rate_text(attack.found[first])} found at "
        f"{first:.0%} false positives"
        for attack in (*findings.attacks, findings.control)
    ]
    if findings.central is not None:
        lines.append(
            f"{findings.central.title}: AUC {findings.central.auc:.3f}, "
            f"{rate_text(findings.central.found[first])}"
        )
    lines += [
        f"classes by answers on synthetic images: {findings.proportions.distance:.2f} off, a "
        f"uniform guess {findings.proportions.uniform:.2f}",
        f"imitation by {findings.imitation[-1].answers:,} answers: agreement "
        f"{percent(findings.imitation[-1].agreement)}",
        f"page: {folder / 'audit.html'}; images that are exposed: {folder / 'exposed.csv'}",
    ]
    return "\n".join(lines)
