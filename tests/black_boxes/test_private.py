"""A client whose images are looked at once: what it keeps, refuses, and never looks at again."""

from __future__ import annotations

import itertools
import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity
from safetensors import safe_open

from fedzge_flwr.black_boxes.node import torch_black_box
from fedzge_flwr.black_boxes.partition import TorchBlackBox
from fedzge_flwr.black_boxes.private import PrivateBlackBox, Releases
from fedzge_flwr.client.endpoints import register_endpoints
from fedzge_flwr.common.errors import ConfigError, RefusedError, StateError
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.data.own import load_own
from fedzge_flwr.images.image_set import ImageSet
from fedzge_flwr.learning.privacy import mu_of
from fedzge_flwr.wire.codec import decode, encode
from fedzge_flwr.wire.messages import LogitsReply, LogitsRequest, Refused, TrainReply, TrainRequest
from tests.helpers.paths import ROOT
from tests.helpers.running import rows_of, run_server

CONFIG: dict[str, Any] = {"num-clients": 3, "num-train-images": 300, "num-test-images": 60}


@pytest.fixture
def settings() -> Settings:
    return from_run_config(CONFIG)


def box(settings: Settings, folder: Path | None, epsilon: float = 8.0, partition: int = 0) -> Any:
    return PrivateBlackBox(settings, partition, 3, Releases(epsilon, 1e-5, folder))


def trained(*arguments: Any, **options: Any) -> dict[str, Any]:
    made = box(*arguments, **options)
    made.fit(1)
    return copied(made.state())


def copied(state: dict[str, Any]) -> dict[str, Any]:
    return {name: np.array(value) for name, value in state.items()}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(np.array_equal(value, other[name]) for name, value in one.items())


def test_a_release_is_made_once_for_all_runs(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trained(settings, tmp_path)
    # A look of another object, in memory or elsewhere, has other noise.
    assert not same(first, trained(settings, None))
    monkeypatch.setattr(PrivateBlackBox, "_looked", lambda *_: pytest.fail("they were looked at"))
    other_run = from_run_config({**CONFIG, "local-epochs": 3, "local-rounds": 1})
    assert same(first, trained(other_run, tmp_path))


def test_what_goes_on_from_a_state_of_the_release_does_not_read_the_images(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = trained(settings, tmp_path)
    monkeypatch.setattr(TorchBlackBox, "_data", lambda *_: pytest.fail("images were read"))
    made = box(settings, tmp_path)
    made.load_state(copied(state))
    assert made.fit(2).num_examples == 0
    assert same(state, made.state())


def test_it_is_trained_once_and_then_distills(settings: Settings) -> None:
    made = box(settings, None)
    images = np.random.default_rng(0).uniform(-1, 1, (80, 1, 8, 8)).astype(np.float32)
    before = made.logits(images)
    assert made.fit(1).num_examples == made.profile().num_examples
    np.testing.assert_array_equal(made.logits(images), before)
    made.distill(1, images, np.zeros((80, 10), np.float32), 1.0)
    after = made.logits(images)
    assert np.abs(after).mean() < np.abs(before).mean()
    assert made.fit(2).num_examples == 0
    np.testing.assert_array_equal(made.logits(images), after)


def test_what_it_tells_beside_logits_is_of_the_release(settings: Settings) -> None:
    held_out = from_run_config({**CONFIG, "client-evaluation": "held-out"})
    made = box(held_out, None)
    profile = made.profile()
    assert profile.data == ""
    assert profile.num_examples >= 1
    assert made.evaluate("held-out").num_examples == 0
    assert made.trained_on() is None
    assert len(made.own_correct(100)) == 0
    assert len(made.held_out()) == 0
    assert not made._rehearses


def test_it_says_of_no_setting_whether_it_has_the_servers(settings: Settings) -> None:
    assert box(settings, None).learns_by() == {}


def test_a_client_without_images_is_like_one_with_one(settings: Settings) -> None:
    none = ImageSet(np.zeros((0, 1, 8, 8), np.uint8), np.zeros(0, np.int64))
    made = PrivateBlackBox(settings, 0, 3, Releases(0.5, 1e-5, None), images=none)
    assert made.profile().num_examples >= 1
    assert made.fit(1).num_examples == made.profile().num_examples


def test_another_data_set_of_the_same_shape_is_another_purpose(
    settings: Settings, tmp_path: Path
) -> None:
    """What was released of one would be a wrong model of the other."""
    own = TorchBlackBox(settings, 0, 3).trained_on()
    assert own is not None
    padded = np.pad(own.images_NCHW, ((0, 0), (0, 0), (10, 10), (10, 10)))
    images = ImageSet(padded, own.labels_N)
    mnist, fashion = (
        PrivateBlackBox(
            from_run_config({**CONFIG, "dataset": name}),
            *(0, 3, Releases(8.0, 1e-5, tmp_path)),
            images=images,
        )
        for name in ("mnist", "fashionmnist")
    )
    mnist.fit(1)
    with pytest.raises(RefusedError):
        fashion.fit(1)


def test_the_count_has_noise(settings: Settings) -> None:
    counts = {box(settings, None, epsilon=0.5).profile().num_examples for _ in range(8)}
    assert len(counts) > 1


def test_images_are_looked_at_for_nothing_else_once_the_budget_is_spent(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(settings, tmp_path)
    for other in (
        lambda: box(settings, tmp_path, partition=1),
        lambda: box(settings, tmp_path, epsilon=2.0),
    ):
        with pytest.raises(RefusedError, match=r"no more of its images \('dp-epsilon'\)"):
            other().fit(1)
        with pytest.raises(RefusedError):
            other().profile()
    assert "looked at with ε = 8 at δ = 1e-05" in caplog.text
    # More is allowed: what is new is the difference.
    trained(settings, tmp_path, epsilon=9.0)
    spent = []
    for path in sorted(tmp_path.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            spent.append(float(file.metadata()["mu"]))
    assert len(spent) == 2
    assert math.hypot(*spent) == pytest.approx(mu_of(9.0, 1e-5))


def test_what_is_not_wholly_kept_has_told_nothing(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.numpy.save_file", full)
        with pytest.raises(StateError, match="No space left"):
            box(settings, tmp_path).fit(1)
    assert list(tmp_path.glob("*.safetensors")) == []
    # As a node leaves it that is killed while it writes.
    half = tmp_path / ".0001-abcd1234.safetensors"
    half.write_bytes(b"half")
    trained(settings, tmp_path)
    half.unlink()
    (only,) = tmp_path.glob("*.safetensors")
    only.write_bytes(only.read_bytes()[:-9])
    with pytest.raises(StateError, match="is not a release"):
        box(settings, tmp_path).fit(1)


KILLED = """
import os, signal, sys
from pathlib import Path
from fedzge_flwr.black_boxes.private import PrivateBlackBox, Releases
from fedzge_flwr.config.parsing import from_run_config
config = {config!r}
made = PrivateBlackBox(from_run_config(config), 0, 3, Releases(8.0, 1e-5, Path(sys.argv[1])))
made.fit(1)
print(made.state()["head.weight"].tobytes().hex(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_client_that_is_killed_goes_on_with_what_it_has_told(
    settings: Settings, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", KILLED.format(config=CONFIG), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert trained(settings, tmp_path)["head.weight"].tobytes().hex() == run.stdout.strip()
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


IMAGES = np.random.default_rng(1).uniform(-1, 1, (20, 1, 8, 8)).astype(np.float32)
LOGITS = np.random.default_rng(2).normal(size=(20, 10)).astype(np.float32)


def distilled(made: Any) -> dict[str, Any]:
    made.distill(1, IMAGES, LOGITS, 1.0)
    return copied(made.state())


def test_a_state_that_is_not_of_the_release_is_put_aside(
    settings: Settings, tmp_path: Path
) -> None:
    """A model that was trained without privacy, or is another's, is never answered from."""
    plain = TorchBlackBox(settings, 0, 3, "gabor-linear")
    plain.fit(1)
    cnn = TorchBlackBox(settings, 0, 3, "cnn").state()
    release = trained(settings, tmp_path)
    elsewhere = trained(settings, tmp_path / "elsewhere")
    for state in (
        plain.state(),
        cnn,
        elsewhere,
        {**plain.state(), "release": elsewhere["release"]},
    ):
        made = box(settings, tmp_path)
        made.load_state(copied(state))
        assert made.begins_anew
        assert same(release, made.state())
        assert made.fit(7).num_examples == made.profile().num_examples


def test_a_state_of_the_release_and_what_was_distilled_since_is_gone_on_from(
    settings: Settings, tmp_path: Path
) -> None:
    first = box(settings, tmp_path)
    # A client that joins late distills before it is first asked to train.
    state = distilled(first)
    assert first.fit(2).num_examples >= 1
    assert same(state, first.state())
    again = box(settings, tmp_path)
    again.load_state(copied(state))
    assert not again.begins_anew
    assert same(state, again.state())
    # As a distillation that goes wrong is undone.
    again.distill(2, IMAGES, LOGITS, 1.0)
    again.load_state(copied(state))
    assert same(state, again.state())


def test_a_distillation_that_is_undone_before_training_is_no_training(
    settings: Settings, tmp_path: Path
) -> None:
    made = box(settings, tmp_path)
    before = copied(made.state())
    distilled(made)
    made.load_state(before)
    assert made.fit(1).num_examples >= 1


def test_a_raised_epsilon_is_answered_from_and_a_lowered_one_refused(
    settings: Settings, tmp_path: Path
) -> None:
    state = distilled(box(settings, tmp_path, epsilon=0.5))
    raised = box(settings, tmp_path, epsilon=8.0)
    raised.load_state(copied(state))
    assert raised.begins_anew
    assert same(trained(settings, tmp_path, epsilon=8.0), raised.state())
    # Of all that was told, 0.5 is no longer true.
    lowered = box(settings, tmp_path, epsilon=0.5)
    lowered.load_state(copied(state))
    for ask in (lowered.profile, lowered.state, lambda: lowered.logits(IMAGES)):
        with pytest.raises(RefusedError):
            ask()


def test_what_is_paid_for_is_had_again_whatever_has_been_looked_at_since(
    settings: Settings, tmp_path: Path
) -> None:
    first = trained(settings, tmp_path)
    trained(settings, tmp_path, epsilon=9.0, partition=1)
    assert same(first, trained(settings, tmp_path, epsilon=9.0))


def test_a_kept_model_of_an_experiment_is_gone_on_from(settings: Settings) -> None:
    """An audit keeps models of releases that it does not keep."""
    state = trained(settings, None)
    made = box(settings, None)
    made.load_state(copied(state))
    assert same(state, made.state())


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"alpha": 0.2},
        {"partition": "iid"},
        {"num-train-images": 200},
    ],
)
def test_a_release_is_not_taken_for_other_images_of_the_same_name(
    other: dict[str, Any], settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(settings, tmp_path)
    changed = from_run_config({**CONFIG, **other})
    for ask in ("profile", "state"):
        with pytest.raises(RefusedError, match=r"no more of its images \('dp-epsilon'\)"):
            getattr(box(changed, tmp_path), ask)()
    assert "own images are not those that were looked at" in caplog.text
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    # Bringing those back is a fix, and a larger budget another.
    trained(settings, tmp_path)
    assert not same(trained(settings, tmp_path), trained(changed, tmp_path, epsilon=9.0))


def test_a_release_is_not_taken_for_images_in_other_classes(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`classes.txt` in another order: the same pictures, and all labels wrong."""
    own = TorchBlackBox(settings, 0, 3).trained_on()
    assert own is not None
    for labels in (own.labels_N, 9 - own.labels_N):
        np.savez(tmp_path / "own.npz", images=own.images_NCHW, labels=labels)
        load_own.cache_clear()
        made = PrivateBlackBox(
            *(settings, 0, 3, Releases(8.0, 1e-5, tmp_path / "private")),
            data_path=str(tmp_path / "own.npz"),
        )
        if labels is own.labels_N:
            made.fit(1)
            continue
        with pytest.raises(RefusedError):
            made.fit(1)
    assert "own images are not those that were looked at" in caplog.text


def test_a_release_that_is_gone_is_not_forgotten(settings: Settings, tmp_path: Path) -> None:
    """Nor is another one written over."""
    for epsilon in (1.0, 8.0):
        trained(settings, tmp_path, epsilon=epsilon)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    content = second.read_bytes()
    aside = first.rename(tmp_path / "aside")
    for ask in ("profile", "state"):
        with pytest.raises(StateError, match=rf"{first} is gone: .* restore it"):
            getattr(box(settings, tmp_path, epsilon=9.0), ask)()
    assert second.read_bytes() == content
    aside.rename(first)
    trained(settings, tmp_path, epsilon=9.0)
    assert [path.stem for path in sorted(tmp_path.glob("*.safetensors"))] == [
        "0001",
        "0002",
        "0003",
    ]
    # A copy under a name of one's own may be one that is missing elsewhere.
    first.rename(tmp_path / "old.safetensors")
    with pytest.raises(StateError, match=r"old\.safetensors is not called as a release is"):
        box(settings, tmp_path, epsilon=9.0).profile()


def answered(request: Any, reply: Any, node_config: dict[str, Any]) -> Any:
    """Send a message to a SuperNode that has just been started; return its reply."""
    app = ClientApp()
    register_endpoints(app, torch_black_box)
    here = context(node_config)
    here.run_config.update({"local-models": "gabor-linear", "local-rounds": 1})
    message = app(Message(encode(request), dst_node_id=1, message_type=request.ACTION), here)
    return decode((reply, Refused), message.content, sender="n", dims={"B": 20, "K": 10})


def test_a_node_that_becomes_private_answers_from_its_release(
    tmp_path: Path,
) -> None:
    """Also after its owner has raised ε; with a lower one it does not answer."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 2, 3
    node: dict[str, Any] = {"state-dir": str(tmp_path)}
    here: dict[str, Any] = {"experiment": "a" * 32}

    def answers(state: str, **more: float) -> Any:
        request = LogitsRequest(round=1, images=IMAGES, state=state, **here)
        return answered(request, LogitsReply, {**node, **more})

    state = answered(TrainRequest(round=1, **here), TrainReply, node).state
    noisy = {"logit-noise": 0.5}
    noises = [answers(state, **noisy).logits - answers(state).logits]
    for epsilon in (0.5, 4.0):
        private = {"dp-epsilon": epsilon}
        found = answers(state, **private).logits
        folder = tmp_path / "node" / "private"
        release = box(from_run_config(CONFIG), folder, epsilon=epsilon).logits(IMAGES)
        np.testing.assert_array_equal(found, release)
        noises.append(answers(state, **private, **noisy).logits - found)
        # Local training was over after one round: nothing is done, and nothing else told.
        request = TrainRequest(round=2, state=state, **here)
        assert answered(request, TrainReply, {**node, **private}).num_examples == 0
        np.testing.assert_array_equal(answers(state, **private).logits, release)
    # Noise is drawn by the model that answers, not by the one that was put aside.
    for one, other in itertools.combinations(noises, 2):
        assert np.abs(one - other).max() > 0.1
    assert isinstance(answers(state, **{"dp-epsilon": 0.5}), Refused)


def context(node_config: dict[str, Any]) -> Context:
    node = {"partition-id": 0, "num-partitions": 3, **node_config}
    return Context(
        run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config=dict(CONFIG)
    )


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"dp-epsilon": 8.0}, "'dp-epsilon' = 8.0 needs a 'state-dir'"),
        ({"dp-epsilon": 0.0, "state-dir": "X"}, "'dp-epsilon' = 0.0: give a number above 0"),
        ({"dp-epsilon": 8.0, "dp-delta": 1.0, "state-dir": "X"}, "'dp-delta' = 1.0: give a number"),
        (
            {"dp-epsilon": 8.0, "model": "cnn", "state-dir": "X"},
            "'model' = 'cnn' has no private training: .* give 'gabor-linear'",
        ),
        (
            {"dp-epsilon": 8.0, "rehearsal": True, "state-dir": "X"},
            "'rehearsal' = True looks at own images again",
        ),
        ({"dp-epsilno": 8.0}, "unknown key 'dp-epsilno': did you mean 'dp-epsilon'"),
    ],
)
def test_what_an_owner_mistakes_is_one_line(
    node: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDZGE_STATE_DIR", raising=False)
    if "state-dir" in node:
        node = {**node, "state-dir": str(tmp_path)}
    with pytest.raises(ConfigError, match=message):
        torch_black_box(context(node))


def test_a_run_and_the_next_one_with_private_clients(
    make_grid: Any, efficient_config: dict[str, Any], tmp_path: Path
) -> None:
    """All messages of two runs; each client's images are looked at once."""
    nodes = {
        number: {
            "partition-id": number,
            "num-partitions": 3,
            "dp-epsilon": 4.0,
            "state-dir": str(tmp_path / f"state-{number}"),
        }
        for number in range(3)
    }
    nodes[1]["dp-told"] = True
    for name in ("one", "two"):
        config = {**efficient_config, "run-name": name, "client-distill-rounds": 0}
        folder = run_server(make_grid(config, node_configs=nodes), config)
        rows = rows_of(folder)
        told = json.loads((folder / "config.json").read_text())["clients"]
        assert ["ε = 4, δ = 1e-05" in told[str(number)] for number in range(3)] == [0, 1, 0]
        assert [row["participants"] for row in rows] == [[0, 1, 2]] * 2
        assert rows[-1]["missing"] == []
    for number in range(3):
        kept = list((tmp_path / f"state-{number}" / "node" / "private").glob("*.safetensors"))
        assert len(kept) == 1
