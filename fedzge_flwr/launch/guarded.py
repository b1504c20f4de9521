"""Flower's servers, closed to other users: ``python -m fedzge_flwr.launch.guarded COMMAND …``.

Flower's open-source SuperLink and SuperNode have no users: whoever reaches the port, from this
machine or another, can submit code, which then runs as the server's user. Here COMMAND
(``flower-superlink`` or ``flower-supernode``) serves its own user's processes on its own machine,
and everybody else the paths of nodes alone, which prove by their keys who they are.

The kernel says whose a connection is, so there is no secret that could leak. Where it does not say
(no ``/proc/net/tcp``: not Linux), nothing is refused, and a warning says so.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from functools import wraps
from importlib.metadata import entry_points
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import uvicorn

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

SIGN = "x-fedzge-guarded"
"""A header of every answer about a guarded server's health."""

_NODES = "/v1/fleet/"
_HEALTH = "/health"
_REFUSED = b"only its own user may ask this of this server, and on its own machine\n"
_CONNECTIONS = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_ESTABLISHED = "01"
# Through which Flower would serve all of this on ports of their own.
_OTHER_DOORS = ("FLWR_INTERNAL_GRPC_CONTROL_API", "FLWR_INTERNAL_GRPC_FLEET_API")

End = tuple[IPv4Address | IPv6Address, int]


class Guard:
    """An ASGI application that lets through to another what its own user and what nodes ask.

    Parameters
    ----------
    app : Callable
        The application.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse with 403."""
        path = str(scope.get("path", ""))
        if path == _HEALTH:
            await self._app(scope, receive, _signed(send))
        elif scope["type"] == "lifespan" or path.startswith(_NODES) or _is_own(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"text/plain")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": _REFUSED})


def _signed(send: Send) -> Send:
    async def with_sign(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ()), (SIGN.encode(), b"1")]
            message = {**message, "headers": headers}
        await send(message)

    return with_sign


def _is_own(scope: Scope) -> bool:
    if not _CONNECTIONS[0].exists():
        return True
    if not scope.get("client") or not scope.get("server"):
        return False
    client, server = _end(*scope["client"]), _end(*scope["server"])
    return owner_of(client, server) == os.geteuid()


def owner_of(client: End, server: End) -> int | None:
    """Return the user whose process holds a connection's other end on this machine; None: nobody.

    What has been closed counts as nobody's: the kernel then names root.
    """
    for table in _CONNECTIONS:
        for ends, state, user, inode in _rows(table):
            if ends == (client, server):
                return user if state == _ESTABLISHED and inode else None
    return None


def _rows(table: Path) -> Iterator[tuple[tuple[End, End], str, int, int]]:
    """Yield a kernel's table of connections: ends, state, user, inode (proc(5), ``/proc/net``)."""
    try:
        lines = table.read_text(encoding="ascii").splitlines()[1:]
    except OSError:
        return
    for line in lines:
        _, local, remote, state, _, _, _, user, _, inode, *_ = line.split()
        yield (_told(local), _told(remote)), state, int(user), int(inode)


def _told(end: str) -> End:
    """Read ``0100007F:1F90``: words of 32 bits in the machine's order, and the port."""
    address, port = end.split(":")
    packed = bytes.fromhex(address)
    words = [packed[i : i + 4] for i in range(0, len(packed), 4)]
    if sys.byteorder == "little":
        words = [word[::-1] for word in words]
    return _end(b"".join(words), int(port, 16))


def _end(address: str | bytes, port: int) -> End:
    """Return one name for what is IPv4, also where it is written as IPv6."""
    found = ip_address(address.partition("%")[0] if isinstance(address, str) else address)
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return mapped or found, port


def guard_servers() -> None:
    """Have every server of uvicorn, which Flower uses, guarded from now on in this process."""
    plain = uvicorn.Config.__init__

    @wraps(plain)
    def guarded(config: uvicorn.Config, app: App, *arguments: Any, **more: Any) -> None:
        # A header must not say who the client is.
        plain(config, Guard(app), *arguments, **{**more, "proxy_headers": False})

    uvicorn.Config.__init__ = guarded  # type: ignore[method-assign, assignment]


def main(command: str, *arguments: str) -> None:
    """Run one of Flower's commands in this process, its servers guarded."""
    if not _CONNECTIONS[0].exists():
        sys.stderr.write(
            "warning: this system does not say whose a connection is: "
            "every user of this machine can submit code to this server\n"
        )
    for variable in _OTHER_DOORS:
        os.environ.pop(variable, None)
    guard_servers()
    (found,) = entry_points(group="console_scripts", name=command)
    sys.argv = [command, *arguments]
    found.load()()


if __name__ == "__main__":
    main(*sys.argv[1:])
