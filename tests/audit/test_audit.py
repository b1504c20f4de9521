"""An audit from end to end, on digits: real models, real guards."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from fedzge_flwr.audit import audit as audit_module
from fedzge_flwr.audit import extraction
from fedzge_flwr.audit.audit import Audited, audit
from fedzge_flwr.audit.command import audit_client
from fedzge_flwr.audit.extraction import class_proportions
from fedzge_flwr.audit.pool import pool_of
from fedzge_flwr.audit.subjects import Endpoint, Subject
from fedzge_flwr.audit.training import train_all
from fedzge_flwr.black_boxes.partition import TorchBlackBox
from fedzge_flwr.cli.app import app
from fedzge_flwr.common.errors import AuditError, ConfigError, DataError
from fedzge_flwr.config.node import from_node_config
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.data.loading import load_split
from fedzge_flwr.images.image_set import ImageSet
from fedzge_flwr.learning.models.catalogue import MODELS, build_model
from tests.helpers.small_models import mlp

CONFIG: dict[str, Any] = {
    "num-clients": 2,
    "alpha": 10.0,
    "num-train-images": 240,
    "num-test-images": 360,
    "local-rounds": 1,
    "min-local-steps": 200,
    **dict.fromkeys(("mixup", "random-shifts", "random-erasing"), False),
}


@pytest.fixture(autouse=True)
def _short_imitations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module, "_IMITATIONS", (20, 300))
    monkeypatch.setattr(extraction, "_STEPS", 60)


@pytest.fixture(scope="module")
def settings() -> Settings:
    return from_run_config(CONFIG)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all audits of these models share."""
    return tmp_path_factory.mktemp("audit")


def subject_of(settings: Settings, images: ImageSet, number: int, **node: Any) -> Subject:
    config = {"partition-id": 0, **node}
    return Subject(settings, 0, images, number, from_node_config(config, settings))


def quiet(_line: str) -> None:
    return


def test_what_an_overfitted_model_was_trained_on_is_found(settings: Settings, kept: Path) -> None:
    central = build_model("cnn", settings.data.spec.image_shape, 10)
    asked = Audited(
        settings, 1, 4, load_split(settings.data, "test"), {"logit-decimals": 3}, central
    )
    told: list[str] = []
    findings = audit(asked, kept, told.append)
    assert findings.attacks[0].auc > 0.6
    assert 0.35 < findings.control.auc < 0.65
    # An untrained model was trained on nothing.
    assert findings.central is not None
    assert 0.35 < findings.central.auc < 0.65
    assert findings.imitation[1].agreement > findings.imitation[0].agreement
    whole = json.loads((kept / "audit.json").read_text())
    assert whole["node_config"] == {"logit-decimals": 3}
    assert [attack["auc"] for attack in whole["attacks"]] == [a.auc for a in findings.attacks]
    of_first = {name: rate["of"] for name, rate in whole["attacks"][0]["groups"].items()}
    of_classes = [of for name, of in of_first.items() if name.startswith("classes")]
    assert sum(of_classes) == whole["members"]
    assert "Audit of client 1" in (kept / "audit.html").read_text()
    lines = (kept / "exposed.csv").read_text().splitlines()
    found = findings.attacks[0].found[0.01]
    assert len(lines) == 1 + found.hits
    own = load_split(settings.data, "train")
    assert all(int(line.split(",")[0]) < len(own) for line in lines[1:])
    assert sorted(line.split(":")[0] for line in told[:5]) == ["client"] + [
        f"shadow {number} of 4" for number in range(1, 5)
    ]
    assert all(": trained on " in line for line in told[:5])
    # A second call trains nothing, and finds the same.
    told.clear()
    again = audit(asked, kept, told.append)
    assert "shadow 1 of 4: was there" in told
    assert again.attacks[0].auc == findings.attacks[0].auc


def test_what_a_client_holds_out_is_no_member() -> None:
    config = {**CONFIG, "client-evaluation": "held-out", "holdout-fraction": 0.25}
    own = [audit_module._own(from_run_config(given), 0) for given in (CONFIG, config)]
    assert len(own[1]) == pytest.approx(0.75 * len(own[0]), abs=1)


def test_shadows_differ_from_the_client_and_from_one_another(
    settings: Settings, tmp_path: Path
) -> None:
    images = load_split(settings.data, "train").take(np.arange(40))
    paths = {subject_of(settings, images, number).path(tmp_path) for number in (0, 0, 1, 2)}
    assert len(paths) == 3
    states = [
        subject_of(settings, images, number).trained(tmp_path / str(place)).state()
        for place, number in enumerate((0, 0, 1, 2))
    ]
    name = next(iter(states[0]))
    assert (states[0][name] == states[1][name]).all()
    assert (states[0][name] != states[2][name]).any()
    assert (states[2][name] != states[3][name]).any()


@pytest.mark.parametrize(
    ("rounds", "local_rounds", "node", "wanted"),
    [
        (2, 6, {}, 2),
        (9, 6, {}, 6),
        (3, 0, {}, 3),
        (3, 0, {"max-trainings": 2}, 2),
        (2, 0, {"max-trainings": 5}, 2),
    ],
)
def test_a_model_is_trained_as_often_as_in_the_run(
    rounds: int,
    local_rounds: int,
    node: dict[str, Any],
    wanted: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fitted: list[int] = []
    monkeypatch.setattr(TorchBlackBox, "fit", lambda _box, round_: fitted.append(round_))
    given = {**CONFIG, "num-server-rounds": rounds, "local-rounds": local_rounds}
    settings = from_run_config(given)
    pool = pool_of(load_split(settings.data, "train"), None, np.random.default_rng(0))
    asked = Audited(settings, 0, 2, node_config=node)
    in_SN = np.zeros((2, len(pool.images)), dtype=bool)
    monkeypatch.setattr(
        audit_module, "train_all", lambda found, folder, _told: [found[0].trained(folder)]
    )
    audit_module._models(asked, pool, in_SN, tmp_path, quiet)
    assert fitted == list(range(1, wanted + 1))


def test_a_kept_model_is_of_the_same_run(tmp_path: Path) -> None:
    def path(client: int = 0, **more: Any) -> Path:
        settings = from_run_config({**CONFIG, "local-rounds": 0, **more})
        images = load_split(settings.data, "train").take(np.arange(40))
        node = from_node_config({"partition-id": client}, settings)
        return Subject(settings, client, images, 0, node).path(tmp_path)

    base = path(**{"num-server-rounds": 2})
    assert path(**{"num-server-rounds": 2}) == base
    assert path(**{"num-server-rounds": 20}) != base
    assert path(**{"num-server-rounds": 2, "partition": "iid"}) != base
    assert path(1, **{"num-server-rounds": 2}) != base


def test_models_of_several_processes_are_those_of_one(settings: Settings, tmp_path: Path) -> None:
    images = load_split(settings.data, "train").take(np.arange(60))
    subjects = [subject_of(settings, images, number) for number in range(3)]
    for subject in subjects:
        subject.trained(tmp_path / "one")
    lines: list[str] = []
    boxes = train_all(subjects, tmp_path / "several", lines.append)
    assert sorted(lines) == [
        "client: trained on 60 images",
        "shadow 1 of 2: trained on 60 images",
        "shadow 2 of 2: trained on 60 images",
    ]
    for subject, box in zip(subjects, boxes, strict=True):
        alone = subject.trained(tmp_path / "one").state()
        assert all((box.state()[name] == value).all() for name, value in alone.items())
    commands = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    assert not [command for command in commands if "popen_loky" in command]


def test_a_model_from_outside_is_trained_here(
    settings: Settings, tmp_path: Path, registries: None
) -> None:
    MODELS["own"] = mlp
    images = load_split(settings.data, "train").take(np.arange(40))
    subjects = [subject_of(settings, images, number, model="own") for number in range(2)]
    assert len(train_all(subjects, tmp_path, quiet)) == 2


def test_a_private_client_is_audited_as_it_is(settings: Settings, tmp_path: Path) -> None:
    """Its shadows are private too; the owner's releases are left alone."""
    asked = Audited(settings, 1, 2, load_split(settings.data, "test"), {"dp-epsilon": 4.0})
    findings = audit(asked, tmp_path, quiet)
    assert findings.attacks[0].auc < 0.62
    state = load_file(next((tmp_path / "models").iterdir()))
    assert state["head.weight"].any()
    plain = subject_of(settings, load_split(settings.data, "train"), 0)
    private = subject_of(settings, load_split(settings.data, "train"), 0, **{"dp-epsilon": 4.0})
    assert plain.path(tmp_path) != private.path(tmp_path)


def test_answers_pass_the_owners_guards(settings: Settings, tmp_path: Path) -> None:
    images = load_split(settings.data, "train").take(np.arange(10))
    subject = subject_of(settings, images, 0).trained(tmp_path)
    plain = Endpoint(subject, {}).logits(images.inputs_NCHW)
    assert (plain == subject.logits(images.inputs_NCHW)).all()
    rounded = Endpoint(subject, {"logit-decimals": 1}).logits(images.inputs_NCHW)
    np.testing.assert_array_equal(rounded, np.round(plain.astype(float), 1).astype(np.float32))
    noisy = Endpoint(subject, {"logit-noise": 1.0}).logits(images.inputs_NCHW)
    assert np.abs(noisy - plain).max() > 0.1
    with pytest.raises(ConfigError, match="logit-noise"):
        Endpoint(subject, {"logit-noise": -1.0})


def test_the_command_fails_above_what_is_allowed(kept: Path) -> None:
    config = " ".join(f"{key}={str(value).lower()}" for key, value in CONFIG.items())
    arguments = ["audit", "--client", "1", "--shadows", "4", "--outside", "test"]
    arguments += ["--node-config", "logit-decimals=3", "--run-config", config, "-o", str(kept)]
    run = CliRunner().invoke(app, [*arguments, "--fail-above", "1"])
    assert run.exit_code == 0, run.output
    assert "shadow 4 of 4: was there" in run.output or "shadow 4 of 4: trained on" in run.output
    assert "LiRA, online: AUC 0." in run.output
    run = CliRunner().invoke(app, [*arguments, "--fail-above", "0"])
    assert run.exit_code == 1
    assert re.search(
        r"^error: .* found at 1% false positives, --fail-above 0 allows fewer", run.output, re.M
    )


def test_what_cannot_be_audited_is_said(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(AuditError, match=r"--client 2: the run's clients are 0 to 1"):
        Audited(settings, 2)
    with pytest.raises(AuditError, match=r"--shadows 3: give an even number, at least 2"):
        Audited(settings, 0, 3)
    with pytest.raises(ConfigError, match="no-such"):
        audit_client("no-such", {}, 0, 2, None, {}, tmp_path, None)
    (tmp_path / "run").mkdir()
    with pytest.raises(OSError, match="not the folder of a finished run"):
        audit_client(str(tmp_path / "run"), {}, 0, 2, None, {}, tmp_path, None)
    with pytest.raises(DataError, match="nowhere"):
        audit_client(None, CONFIG, 0, 2, str(tmp_path / "nowhere"), {}, tmp_path, None)


def test_a_kept_model_that_is_none_is_named(settings: Settings, tmp_path: Path) -> None:
    images = load_split(settings.data, "train").take(np.arange(40))
    subject_of(settings, images, 0).trained(tmp_path)
    path = next(tmp_path.iterdir())
    path.write_bytes(b"nothing")
    with pytest.raises(DataError, match=path.name):
        subject_of(settings, images, 0).trained(tmp_path)


def test_the_guess_of_classes_by_hand() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.7, 0.05, 0.25]], dtype=np.float32))
    found = class_proportions(logits, np.array([0, 0, 0, 2]))
    # The guess is 0.6, 0.15, 0.25; the truth 0.75, 0, 0.25.
    assert found.distance == pytest.approx(0.15)
    assert found.uniform == pytest.approx((0.75 - 1 / 3 + 1 / 3 + 1 / 3 - 0.25) / 2)
    assert found.rank_correlation == pytest.approx(1.0)
    assert class_proportions(logits, np.array([0, 1, 2])).rank_correlation == 0.0
