"""A simulation's SuperLink of a launch's own, for what ``flwr run`` is to be tested with."""

from __future__ import annotations

import sys
import urllib.request

import tomli_w

from fedzge_flwr.common.files import atomic_write_text
from fedzge_flwr.launch.session import Session, free_ports
from fedzge_flwr.launch.submission import CONNECTION

START_S = 60.0


def start_superlink(launch: Session) -> int:
    """Start it, known to Flower's commands as `CONNECTION`; return its port."""
    (port,) = free_ports(1)
    superlink = launch.start(
        "superlink",
        [
            *(sys.executable, "-m", "fedzge_flwr.launch.guarded", "flower-superlink"),
            *("--insecure", "--simulation", "--disable-runtime-dependency-installation"),
            *("--host", "127.0.0.1", "--port", str(port)),
        ],
    )
    launch.wait(superlink, "superlink", lambda: _healthy(port), START_S)
    connection = {"address": f"127.0.0.1:{port}", "insecure": True}
    content = {"superlink": {"default": CONNECTION, CONNECTION: connection}}
    (launch.home / "flwr").mkdir(exist_ok=True)
    atomic_write_text(launch.home / "flwr" / "config.toml", tomli_w.dumps(content))
    return port


def _healthy(port: int) -> bool:
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{port}/health", timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False
