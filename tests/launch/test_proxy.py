"""``deploy/proxy.sh`` with the real nginx: nodes get through, and nobody else."""

from __future__ import annotations

import json
import shutil
import ssl
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from fedzge_flwr.launch import deployment
from fedzge_flwr.launch.session import LaunchError, Session, free_ports, session
from fedzge_flwr.launch.submission import CONNECTION, submit
from tests.helpers.guided import SETTINGS
from tests.helpers.launching import ROOT, toml_pairs

DEPLOY = ROOT / "deploy"

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed"),
]


def status_of(url: str, method: str, trust: ssl.SSLContext) -> int:
    data = b"" if method == "POST" else None
    request = urllib.request.Request(url, data=data, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20, context=trust) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


def start_proxy(launch: Session, superlink: int) -> int:
    (port,) = free_ports(1)
    certificates = launch.home / "certificates"
    command: list[str | Path] = [DEPLOY / "proxy.sh", certificates, launch.home / "proxy"]
    proxy = launch.start("proxy", [*command, "127.0.0.1", str(port), str(superlink)])
    trust = ssl.create_default_context(cafile=str(certificates / "ca.crt"))

    def answers() -> bool:
        try:
            return status_of(f"https://127.0.0.1:{port}/", "GET", trust) == 403
        except OSError:
            return False

    launch.wait(proxy, "proxy", answers, 30)
    return port


def test_nodes_get_through_the_proxy_and_nobody_else(tmp_path: Path) -> None:
    """A run by nodes that know the proxy alone; then all that is no node's is refused there."""
    config = {**SETTINGS, "output-dir": str(tmp_path), "run-name": "run"}
    config |= {"num-clients": 1, "num-server-rounds": 1}
    with session(config, lambda _: {}) as launch:
        (superlink,) = free_ports(1)
        deployment.start_superlink(launch, DEPLOY, superlink)
        port = start_proxy(launch, superlink)
        deployment.start_supernodes(launch, DEPLOY, port, free_ports(1))
        command: list[str | Path] = [DEPLOY / "submit.sh", CONNECTION, toml_pairs(config)]
        submit(launch, [*command, "--stream"], "running through the proxy")
        assert json.loads((tmp_path / "run" / "config.json").read_text())["status"] == "finished"

        trust = ssl.create_default_context(cafile=str(launch.home / "certificates" / "ca.crt"))
        calls = ["control/start-run", "control/list-runs", "runtime/acquire-task", "fleet/../x"]
        calls += ["fleet/get-run/x", "fleet/..%2fcontrol/start-run", "fleet", "fleet//get-run/"]
        for call in calls:
            assert status_of(f"https://127.0.0.1:{port}/v1/{call}", "POST", trust) == 403, call
        for path in ("/docs", "/openapi.json", "/health", "/v1/fleet/get-run"):
            assert status_of(f"https://127.0.0.1:{port}{path}", "GET", trust) == 403, path
        # Who gets through has to prove that it is a node.
        assert status_of(f"https://127.0.0.1:{port}/v1/fleet/get-run", "POST", trust) >= 400
        authority = launch.home / "certificates" / "ca.crt"
        launch.finish("c", [DEPLOY / "connection.sh", "proxied", f"127.0.0.1:{port}", authority])
        with pytest.raises(LaunchError, match="refused the app"):
            submit(launch, [*command[:1], "proxied", *command[2:], "--stream"], "submitting")
