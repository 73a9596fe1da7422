"""Block connections of tests to other machines; the error names the host."""

import ipaddress
import sys


def _is_local(host) -> bool:
    if host in (None, "", "localhost", b"localhost"):
        return True
    try:
        address = ipaddress.ip_address(host.decode() if isinstance(host, bytes) else host)
    except ValueError:  # `host` is a name, not an IP address
        return False
    return address.is_loopback or address.is_unspecified


def _hook(event: str, arguments: tuple) -> None:
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):  # a string for Unix sockets
        host = arguments[1][0]
    else:
        return
    if not _is_local(host):
        raise PermissionError(f"{event} to {host} is blocked: tests do not use the network (see tests/server.py)")


def forbid() -> None:
    """Block connections to other machines in this process and in all processes forked from it."""
    sys.addaudithook(_hook)
