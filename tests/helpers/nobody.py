"""Another user of this machine: what it can do to a run of ours."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys

import pytest

NOBODY = "nobody"

# Python itself may lie where that user cannot read: what is needed is imported before.
_BECOME = """
import encodings.idna, os, pwd, sys
{imports}
user = pwd.getpwnam("{user}")
os.setgroups([])
os.setgid(user.pw_gid)
os.setuid(user.pw_uid)
assert os.getresuid() == (user.pw_uid,) * 3 and user.pw_uid != 0
os.chdir("/")
{code}
"""


def python_as_nobody(imports: str, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script as that user, with nothing of this process's environment.

    Parameters
    ----------
    imports : str
        Done before root's rights are given up.
    code : str
        The script, which finds ``arguments`` in `sys.argv`.
    """
    script = _BECOME.format(imports=imports, user=NOBODY, code=code)
    return subprocess.run(
        [sys.executable, "-P", "-c", script, *arguments],
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def nobody() -> int:
    """The number of the other user; skips where nobody can act as another."""
    if os.geteuid() != 0:
        pytest.skip("only root can act as another user")
    try:
        return pwd.getpwnam(NOBODY).pw_uid
    except KeyError:
        pytest.skip(f"there is no {NOBODY} here")
