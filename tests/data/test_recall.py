from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.data import partition
from fedzge_flwr.data import recall as recall_module
from fedzge_flwr.data.partition import partition_indices
from fedzge_flwr.data.recall import Arrays, digest_of, recall

ARRAYS = {"a": np.arange(5), "b": np.zeros((2, 3), np.uint8)}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fedzge-flwr"


class Counted:
    """Computes `ARRAYS`, and counts how often it is asked to."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> Arrays:
        self.times += 1
        return dict(ARRAYS)


def assert_same(found: Arrays) -> None:
    assert set(found) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        assert (found[name] == array).all()


def test_what_was_computed_once_is_read_back(cache: Path) -> None:
    compute = Counted()
    for _ in range(3):
        assert_same(recall("x", compute, library="numpy", seed=1))
    assert compute.times == 1
    assert [path.name.partition("-")[0] for path in cache.iterdir()] == ["x"]


@pytest.mark.parametrize(
    "other",
    [
        {"name": "y", "library": "numpy", "seed": 1},
        {"name": "x", "library": "pandas", "seed": 1},
        {"name": "x", "library": "numpy", "seed": 2},
        {"name": "x", "library": "numpy", "seed": 1, "more": None},
    ],
)
def test_all_that_it_depends_on_counts(other: dict[str, Any]) -> None:
    compute = Counted()
    recall("x", compute, library="numpy", seed=1)
    recall(compute=compute, **other)
    assert compute.times == 2


def test_another_version_computes_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = Counted()
    recall("x", compute, library="numpy")
    monkeypatch.setattr(recall_module, "version", lambda _: "0.0")
    recall("x", compute, library="numpy")
    monkeypatch.setattr(recall_module, "__version__", "0.0")
    recall("x", compute, library="numpy")
    assert compute.times == 3


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "pickled"])
def test_a_damaged_file_is_replaced(damage: str, cache: Path) -> None:
    compute = Counted()
    recall("x", compute, library="numpy")
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    if damage == "pickled":
        np.savez(path, a=np.array([{}], dtype=object))
    else:
        middle = whole.index(b"\x04\0\0\0\0\0\0\0")  # the last value of a
        damaged = whole[:middle] + b"\x05" + whole[middle + 1 :]
        path.write_bytes({"cut": whole[:100], "changed": damaged, "empty": b""}[damage])
    assert_same(recall("x", compute, library="numpy"))
    assert_same(recall("x", compute, library="numpy"))
    assert compute.times == 2


def test_without_a_folder_it_is_computed_each_time(tmp_path: Path, cache: Path) -> None:
    cache.write_text("not a folder")
    compute = Counted()
    for _ in range(2):
        assert_same(recall("x", compute, library="numpy"))
    assert compute.times == 2


def test_an_error_is_not_kept(cache: Path) -> None:
    def fail() -> Arrays:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        recall("x", fail, library="numpy")
    assert not cache.exists()


def test_the_oldest_files_go(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall_module, "_KEPT", 3)
    for seed in range(5):
        recall("x", Counted(), library="numpy", seed=seed)
    assert len(list(cache.iterdir())) == 3
    newest = Counted()
    recall("x", newest, library="numpy", seed=4)
    assert newest.times == 0


def test_digest_is_of_values() -> None:
    array = np.arange(6).reshape(2, 3)
    assert digest_of(array.T) != digest_of(array)
    assert digest_of(array.T) == digest_of(np.ascontiguousarray(array.T))


@pytest.mark.parametrize("how", ["iid", "dirichlet", "pathological"])
def test_a_recalled_partition_is_the_same(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = from_run_config({"partition": how, "classes-per-client": 3}).data
    first = partition_indices(data, 4, 11)
    partition._partition_indices.cache_clear()
    monkeypatch.setattr(partition, "_divide", lambda *_: pytest.fail("computed again"))
    again = partition_indices(data, 4, 11)
    assert len(first) == len(again) == 4
    for one, other in zip(first, again, strict=True):
        assert one.dtype == other.dtype == np.int64
        assert one.tolist() == other.tolist()


@pytest.mark.parametrize(
    "change",
    [
        {"alpha": 0.3},
        {"num-train-images": 900},
        {"min-partition-size": 280},
        {"partition": "iid"},
        {"partition": "pathological"},
    ],
)
def test_every_setting_of_the_partition_counts(change: dict[str, Any]) -> None:
    config = {"partition": "dirichlet", "alpha": 0.5, "min-partition-size": 10}
    first = partition_indices(from_run_config(config).data, 4, 11)
    other = partition_indices(from_run_config({**config, **change}).data, 4, 11)
    assert any(one.tolist() != two.tolist() for one, two in zip(first, other, strict=True))


def test_a_second_process_loads_no_large_library() -> None:
    code = (
        "import sys; from fedzge_flwr.config.parsing import from_run_config; "
        "from fedzge_flwr.data.partition import client_data; "
        "client_data(from_run_config({}).data, 3, 0, 1, hold_out=False); "
        "print([name for name in ('sklearn', 'datasets', 'torch') if name in sys.modules])"
    )
    for expected in ("['sklearn', 'datasets'", "[]"):
        found = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert found.stdout.startswith(expected)


def test_the_number_of_classes_per_client_counts() -> None:
    config = {"partition": "pathological", "classes-per-client": 2}
    first = partition_indices(from_run_config(config).data, 5, 11)
    other = partition_indices(from_run_config({**config, "classes-per-client": 4}).data, 5, 11)
    assert any(one.tolist() != two.tolist() for one, two in zip(first, other, strict=True))


def test_what_others_have_put_into_the_cache_is_not_read(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Counted()
    recall("x", compute, library="numpy", seed=1)
    (kept,) = cache.iterdir()
    uid = os.geteuid()
    # Its owner is then somebody else, who is not root either.
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    kept.chmod(0o644)
    if uid == 0:
        os.chown(kept, 12345, -1)
    assert_same(recall("x", compute, library="numpy", seed=1))
    assert compute.times == 2
    kept.unlink(missing_ok=True)
    os.mkfifo(kept)
    assert_same(recall("x", compute, library="numpy", seed=1))
    assert compute.times == 3
