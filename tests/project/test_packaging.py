"""The wheel: the library alone, small, and a project on it works without this repository's apps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

LARGEST_WHEEL = 460_000


def finish(command: list[str], cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wheel")
    finish([sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(place), str(ROOT)], place)
    (path,) = place.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's packages in a folder, to come before an editable installation's."""
    place = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(place)]
    finish([*pip, str(wheel)], place)
    return place


def test_the_wheel_holds_the_library_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fedzge_flwr"}
    assert "fedzge_flwr/py.typed" in names
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "fedzge_flwr").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if not name.split("/")[0].endswith(".dist-info")} == sources
    assert wheel.stat().st_size < LARGEST_WHEEL


def test_importing_what_was_installed(installed: Path, tmp_path: Path) -> None:
    code = (
        "import sys, fedzge_flwr; heavy = {'torch', 'torchvision', 'matplotlib', 'flwr', 'ray'}; "
        "print(fedzge_flwr.__file__, heavy & set(sys.modules))"
    )
    found = finish([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(installed))
    assert found.split() == [str(installed / "fedzge_flwr" / "__init__.py"), "set()"]


def test_a_project_on_the_installed_library(installed: Path, tmp_path: Path) -> None:
    """Two rounds of one; nothing of the library comes from the checkout."""
    code = (
        "import sys; from pathlib import Path; from tests.helpers.inprocess import InProcessGrid; "
        "from tests.helpers import typed_project as mine; losses = mine.Losses(); "
        "mine.run(InProcessGrid(mine.client_app(), {}, 2), Path('checkpoints'), losses); "
        "print(sorted(losses.by_round)); "
        "print({module.__file__ for name, module in sys.modules.items() "
        "if name.split('.')[0] == 'fedzge_flwr'})"
    )
    out = finish(
        [sys.executable, "-c", code],
        tmp_path,
        PYTHONPATH=f"{installed}{os.pathsep}{ROOT}",
        OMP_NUM_THREADS="1",
    )
    rounds, files = out.splitlines()[-2:]
    assert rounds == "[1, 2]"
    assert str(installed) in files
    assert str(ROOT) not in files


def test_the_documented_extras_are_there() -> None:
    """Each names what it installs, and what needs it says which."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/*.[mt]*")]
    sources = [*pages, *ROOT.glob("fedzge_flwr/**/*.py")]
    found = {
        extra
        for path in sources
        for extras in re.findall(r"(?:fedzge-flwr|\.)\[([a-z,]+)\]", path.read_text())
        for extra in extras.split(",")
    }
    assert found == {"onnx", "tensorboard"}
    assert found < set(project["optional-dependencies"])
