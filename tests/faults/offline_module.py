"""A user's module that takes the network away, this host excepted, and counts who asks for it."""

import socket
from typing import Any

import tests.distributed.user_module  # noqa: F401 registers the model and the data

_HERE = ("127.0.0.1", "localhost", "::1", "")
_connect, _look_up = socket.socket.connect, socket.getaddrinfo


def _connect_here(self: socket.socket, address: Any) -> None:
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in _HERE:
        raise OSError(101, f"the network is unreachable: {address}")
    _connect(self, address)


def _look_up_here(host: Any, *args: Any, **kwargs: Any) -> Any:
    if host not in (*_HERE, None, socket.gethostname()):
        raise socket.gaierror(-3, f"no name server: {host}")
    return _look_up(host, *args, **kwargs)


socket.socket.connect = _connect_here  # type: ignore[method-assign]
socket.getaddrinfo = _look_up_here
