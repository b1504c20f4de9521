"""What the library offers, and that it costs nothing until it is used."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
from flwr.app import Context
from safetensors.torch import save_file
from torch import nn

import fedzge_flwr
from fedzge_flwr import ENSEMBLES, Answers, DatasetSpec, FedZGE, FedZGEError, make_settings
from fedzge_flwr.learning.export import export_onnx, load_central, main
from fedzge_flwr.learning.models.catalogue import build_model
from tests.helpers.paths import ROOT, modules_after
from tests.helpers.running import run_server

# fmt: off
PUBLIC = {
    "Answers", "BlackBox", "COPIES", "Checkpoint", "CheckpointFolder", "ClassifierBlackBox",
    "ClientEvaluation", "ClientProfile", "CommonTestSet", "DATASETS", "DatasetSpec", "Directions",
    "ENSEMBLES", "ESTIMATORS", "Estimate", "Estimator", "FedZGE", "FedZGEError", "FitReport",
    "FunctionBlackBox", "GENERATORS", "ImageSet", "LOADERS", "MODELS", "Memories",
    "ModuleBlackBox", "Normalized", "OBJECTIVES", "Objective", "ObjectiveWeights", "Observer",
    "OnnxBlackBox",
    "Proposed", "Queries", "Question", "Recalls", "Rescaled", "RoundRow", "RunFolder", "SOURCES",
    "Settings",
    "SklearnBlackBox", "TensorBoard", "TorchBlackBox", "__version__", "best_scale",
    "evaluate_at_clients", "export_onnx", "fitted_scale",
    "from_run_config", "generator_objective", "losses_by_scale", "make_settings",
    "register_endpoints", "torch_black_box",
}
# fmt: on


def test_the_public_names_are_these() -> None:
    assert sorted(fedzge_flwr.__all__) == sorted(PUBLIC)
    assert sorted(dir(fedzge_flwr)) == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(fedzge_flwr, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Strategy'"):
        _ = fedzge_flwr.Strategy


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "fedzge_flwr" / "__init__.py").read_text())
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        (item.module, alias.name)
        for item in guarded.body
        if isinstance(item, ast.ImportFrom)
        for alias in item.names
    }
    homes = {
        (f"fedzge_flwr.{home}", name)
        for home, names in fedzge_flwr._HOMES.items()
        for name in names
    }
    assert seen == homes
    assert {name for _, name in seen} | {"__version__"} == PUBLIC


CALLABLES = sorted(
    name
    for name in PUBLIC
    if inspect.isclass(getattr(fedzge_flwr, name)) or inspect.isfunction(getattr(fedzge_flwr, name))
)


@pytest.mark.parametrize("name", CALLABLES)
def test_public_classes_and_functions_are_documented(name: str) -> None:
    """Each has a text, and a section that names every parameter."""
    thing = getattr(fedzge_flwr, name)
    text = inspect.getdoc(thing)
    assert text
    if inspect.isclass(thing):
        for member, function in inspect.getmembers(thing, is_public_member):
            assert inspect.getdoc(function), member
        if issubclass(thing, Exception) or getattr(thing, "_is_protocol", False):
            return
    wanted = set(inspect.signature(thing).parameters)
    assert documented_parameters(text) >= wanted


def documented_parameters(text: str) -> set[str]:
    _, _, section = text.partition("Parameters\n----------\n")
    section = re.split(r"\n\n?\w+\n-{3,}\n", section)[0]
    heads = [line for line in section.splitlines() if line and not line.startswith(" ")]
    return {name.strip("* ") for line in heads for name in line.split(":")[0].split(",")}


def is_public_member(member: object) -> bool:
    function = getattr(member, "fget", member)
    return (
        inspect.isfunction(function)
        and function.__module__.startswith("fedzge_flwr")
        and not function.__name__.startswith("_")
    )


# Of the strategy's own state, which observers may look at; and parts of a row, which are only read.
NOT_TO_BE_MADE = {"ServerState", "RoundState", "MissingReply", "Traffic"}


@pytest.mark.parametrize("name", CALLABLES)
def test_what_public_calls_take_is_public(name: str) -> None:
    thing = getattr(fedzge_flwr, name)
    functions = [thing]
    if inspect.isclass(thing):
        functions = [getattr(f, "fget", f) for _, f in inspect.getmembers(thing, is_public_member)]
        functions += [thing.__init__] if inspect.isfunction(thing.__init__) else []
    # What modules import for type checkers alone.
    known = {"Context": Context, "nn": nn, "np": np, "npt": npt, "pd": pd}
    classes = {
        found
        for function in functions
        for hint in get_type_hints(function, localns=known).values()
        for found in classes_in(hint)
    }
    ours = {found.__name__ for found in classes if found.__module__.startswith("fedzge_flwr")}
    assert ours - NOT_TO_BE_MADE <= PUBLIC


def classes_in(hint: Any) -> Iterator[type]:
    """The classes that an annotation is made of."""
    parts = get_args(hint)
    if isinstance(hint, type) and not parts:
        yield hint
    for part in parts:
        for inner in part if isinstance(part, list) else [part]:
            yield from classes_in(inner)


def test_importing_the_library_loads_nothing_heavy() -> None:
    heavy = {"torch", "flwr", "ray", "torchvision", "matplotlib", "pandas", "sklearn", "pydantic"}
    assert not modules_after("import fedzge_flwr") & heavy
    boxes = modules_after("from fedzge_flwr import SklearnBlackBox, OnnxBlackBox")
    assert not boxes & {"torch", "sklearn", "onnxruntime", "torchvision", "matplotlib"}
    strategy = modules_after("from fedzge_flwr import FedZGE")
    assert not strategy & {"torchvision", "matplotlib", "sklearn", "datasets"}


def test_settings_of_a_project_of_its_own() -> None:
    settings = make_settings(image_shape=(3, 30, 40), num_classes=7, num_clients=4, alpha=0.5)
    assert settings.data.spec == DatasetSpec(7, (3, 30, 40))
    assert settings.run.client_evaluation == settings.run.server_evaluation == "off"
    assert (settings.run.num_clients, settings.data.alpha) == (4, 0.5)
    held_out = make_settings(image_shape=(1, 8, 8), num_classes=2, client_evaluation="held-out")
    assert held_out.run.client_evaluation == "held-out"
    with pytest.raises(FedZGEError, match="unknown key 'num-client': did you mean 'num-clients'"):
        make_settings(num_client=4)


def test_the_generator_is_the_settings_own_if_none_is_given() -> None:
    settings = make_settings(image_shape=(3, 30, 30), num_classes=7, generator="unconditional")
    strategy = FedZGE(settings, build_model("cnn", (3, 30, 30), 7))
    images = strategy._generator(torch.randn(2, settings.images.latent_dim), torch.zeros(2))
    assert images.shape == (2, 3, 30, 30)


def test_a_model_leaves_as_onnx(tmp_path: Path) -> None:
    import onnxruntime

    model = build_model("cnn", (1, 8, 8), 5).train()
    export_onnx(model, tmp_path / "central.onnx", (1, 8, 8))
    assert model.training
    assert [path.name for path in tmp_path.iterdir()] == ["central.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "central.onnx")
    images = np.random.default_rng(0).normal(size=(3, 1, 8, 8)).astype(np.float32)
    with torch.inference_mode():
        wanted = model.eval()(torch.from_numpy(images)).numpy()
    for count in (1, 3):
        (found,) = session.run(["logits"], {"images": images[:count]})
        np.testing.assert_allclose(found, wanted[:count], atol=1e-5)


def test_answers_that_no_ensemble_softened_are_exported_as_they_are(
    make_grid: Any, tiny_config: dict[str, Any]
) -> None:
    """The mean of logits takes no temperature, whatever the settings say."""
    config = {**tiny_config, "answer-temperature": 2.0, "ensemble": "mean"}
    assert load_central(run_server(make_grid(config), config)).softened == 1.0
    logits = {0: np.float32([[1, 2]]), 1: np.float32([[3, 0]])}
    even = np.full(2, 0.5)
    answers = Answers(logits, {0: 1.0, 1: 1.0}, {0: even, 1: even})
    softened = replace(answers, temperature=2.0)
    for name, combine in ENSEMBLES.items():
        alike = np.allclose(combine(softened), combine(answers))
        assert alike == (make_settings(ensemble=name).queries.softening == 1.0), name


def test_a_run_is_exported_and_answers_as_its_central_model(
    tmp_path: Path, make_grid: Any, tiny_config: dict[str, Any]
) -> None:
    import onnxruntime

    config = {**tiny_config, "answer-temperature": 2.0, "ensemble": "known-contrasts"}
    folder = run_server(make_grid(config), config)
    model, shape, softened = load_central(folder)
    assert softened == 2.0
    main([str(folder), str(tmp_path / "central.onnx")])
    images = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    session = onnxruntime.InferenceSession(tmp_path / "central.onnx")
    with torch.inference_mode():
        wanted = 2 * model.eval()(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(session.run(["logits"], {"images": images})[0], wanted, atol=1e-5)
    # A strategy may be given any model, and its run's settings name another.
    save_file({"mine": torch.zeros(2)}, folder / "central.safetensors")
    with pytest.raises(SystemExit, match=r"central model is not the 'cnn'.*export_onnx") as caught:
        main([str(folder), str(tmp_path / "other.onnx")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "other.onnx").exists()


def test_export_of_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: .* is not the folder of a finished run"):
        main([str(tmp_path), str(tmp_path / "x.onnx")])
    with pytest.raises(FedZGEError):
        load_central(tmp_path)


def test_docstring_examples() -> None:
    code = """
import doctest, importlib, pkgutil, sys, fedzge_flwr
failed = attempted = 0
for module in pkgutil.walk_packages(fedzge_flwr.__path__, "fedzge_flwr."):
    if not module.name.endswith("__main__"):
        found = doctest.testmod(importlib.import_module(module.name))
        failed, attempted = failed + found.failed, attempted + found.attempted
sys.exit(failed or attempted < 5)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
