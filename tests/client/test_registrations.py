"""What an app registers is there in processes to which Flower sends its ClientApp pickled."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flwr.clientapp import ClientApp
from ray import cloudpickle

from fedzge_flwr import COPIES, DATASETS, LOADERS, MODELS, register_endpoints, torch_black_box
from fedzge_flwr.client.registrations import register_again, registrations
from fedzge_flwr.common.registry import Registry
from tests.helpers.paths import ROOT
from tests.helpers.small_models import mlp
from tests.helpers.snippets import SNIPPETS

pytestmark = pytest.mark.usefixtures("registries")

ELSEWHERE = """
import json, sys
from ray import cloudpickle
app = cloudpickle.loads(open(sys.argv[1], "rb").read())
from fedzge_flwr import COPIES, DATASETS, LOADERS, MODELS
def said(entry):
    return f"{entry.__module__}.{entry.__qualname__}" if hasattr(entry, "__qualname__") else None
print(json.dumps({
    "actions": len(app._registered_funcs),
    "models": {name: said(entry) for name, entry in MODELS.added().items()},
    "loaders": {name: said(entry) for name, entry in LOADERS.added().items()},
    "classes": {name: spec.num_classes for name, spec in DATASETS.added().items()},
    "copies": {name: count(3, True) for name, count in COPIES.added().items()},
    "logits": {name: list(build((1, 8, 8), 3)(__import__("torch").zeros(2, 1, 8, 8)).shape)
               for name, build in MODELS.added().items()},
}))
"""


@pytest.fixture
def mymodels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The documentation's own snippets, as a user's module."""
    (tmp_path / "mymodels.py").write_text(SNIPPETS["model"] + SNIPPETS["dataset"])
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("mymodels")
    del sys.modules["mymodels"]


def test_a_pickled_app_takes_along_what_is_registered(mymodels: Any, tmp_path: Path) -> None:
    """Functions of a module, and those that have none there: partials and lambdas."""
    app = ClientApp()
    register_endpoints(app, torch_black_box)
    # Later than the endpoints, and under a name of the package's own.
    MODELS["cnn"] = lambda shape, num_classes: mymodels.linear(shape, num_classes)
    MODELS["narrow"] = partial(mymodels.linear)
    COPIES["mine"] = lambda q, two_sided: 7 * q
    file = tmp_path / "app"
    file.write_bytes(cloudpickle.dumps(app))
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(file)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
    )
    found = json.loads(done.stdout)
    assert found["actions"] == 6
    assert found["models"]["linear"] == "mymodels.linear"
    assert set(found["models"]) == {"linear", "cnn", "narrow"}
    assert found["loaders"] == {"blobs": "mymodels.load"}
    assert found["classes"] == {"blobs": 3}
    assert found["copies"] == {"mine": 21}
    assert found["logits"] == {name: [2, 3] for name in found["models"]}


def test_nothing_of_the_packages_own_is_sent() -> None:
    assert registrations() == {}
    MODELS["mine"] = mlp
    assert registrations() == {"fedzge_flwr.learning.models.catalogue": {"mine": mlp}}


def test_what_is_there_stays() -> None:
    """A function that is sent by value is another with each message, and would be probed anew."""
    MODELS["mine"] = mlp
    place = "fedzge_flwr.learning.models.catalogue"
    register_again({place: {"mine": lambda *_: None, "cnn": mlp}})  # type: ignore[dict-item]
    assert MODELS["mine"] is mlp
    assert MODELS["cnn"] is mlp


def test_registries_are_told_apart_from_what_was_added() -> None:
    for registry in (COPIES, DATASETS, LOADERS, MODELS):
        assert isinstance(registry, Registry)
        assert registry.added() == {}
    registry = Registry({"a": [1], "b": [2]})
    registry["a"] = [1]
    registry["c"] = [3]
    assert registry.added() == {"a": [1], "c": [3]}
