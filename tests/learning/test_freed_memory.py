"""Freed memory that the process keeps: fewer pages from the kernel, unless its owner has chosen."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

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
from fedzge_flwr.learning.numerics import keep_freed_memory
print(keep_freed_memory(), keep_freed_memory())
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def said(program: str, *arguments: str, **environment: str) -> str:
    """What a process of its own prints: what is set there stays set."""
    plain = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    plain.pop("GLIBC_TUNABLES", None)
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env={**plain, **environment},
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


@glibc
@pytest.mark.parametrize(
    ("environment", "done"),
    [
        ({}, "True True"),
        ({"MALLOC_TRIM_THRESHOLD_": "131072"}, "False False"),
        ({"MALLOC_MMAP_THRESHOLD_": "131072"}, "False False"),
        ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}, "False False"),
        ({"GLIBC_TUNABLES": "glibc.pthread.rseq=1"}, "True True"),
    ],
)
def test_what_the_environment_has_chosen_stays(environment: dict[str, str], done: str) -> None:
    assert said(ASKED, **environment) == done
