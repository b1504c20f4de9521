"""Freed memory that the process keeps: fewer pages from the kernel, unless its owner has chosen."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from functools import lru_cache

import pytest

from tests.helpers.paths import ROOT

STEPS = """
import resource, sys, torch
from fedzge_flwr.learning.models.catalogue import build_model
from fedzge_flwr.learning.numerics import threads

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

torch.manual_seed(0)
torch.set_num_threads(1)
model = build_model("cnn", (1, 28, 28), 10)
images = torch.randn(64, 1, 28, 28)

def steps(number):
    for _ in range(number):
        model.zero_grad()
        model(images).logsumexp(dim=1).sum().backward()

if sys.argv[1] == "kept":
    with threads(1):
        steps(5)
else:
    steps(5)
before = faults()
steps(20)
print((faults() - before) // 20)
"""

ASKED = """
import json, os, sys
from fedzge_flwr.learning.numerics import keep_freed_memory
plain = dict(os.environ)
for environment in json.loads(sys.argv[1]):
    os.environ.clear()
    os.environ.update(plain | environment)
    keep_freed_memory.cache_clear()
    print(keep_freed_memory(), keep_freed_memory())
"""

CASES: list[tuple[dict[str, str], str]] = [
    ({}, "True True"),
    ({"MALLOC_TRIM_THRESHOLD_": "131072"}, "False False"),
    ({"MALLOC_MMAP_THRESHOLD_": "131072"}, "False False"),
    ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}, "False False"),
    ({"GLIBC_TUNABLES": "glibc.pthread.rseq=1"}, "True True"),
]
"""Environments, and what is said in them of being asked twice."""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def said(program: str, *arguments: str) -> str:
    """What a process of its own prints: what is set there stays set."""
    plain = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    plain.pop("GLIBC_TUNABLES", None)
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env=plain,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@glibc
def test_a_step_asks_the_kernel_for_no_page_that_it_had_before() -> None:
    """A step of the small CNN faults some thousand times without, and a few times with it."""
    without, kept = int(said(STEPS, "not kept")), int(said(STEPS, "kept"))
    assert kept < without / 5 or without < 100, (without, kept)
    assert kept < 500


@lru_cache
def asked() -> list[str]:
    """What one process says in each of them."""
    return said(ASKED, json.dumps([environment for environment, _ in CASES])).splitlines()


@glibc
@pytest.mark.parametrize("number", range(len(CASES)))
def test_what_the_environment_has_chosen_stays(number: int) -> None:
    assert asked()[number] == CASES[number][1]
