"""Block network access from tests; the error names the host."""

import ipaddress
import sys


def _is_local(host) -> bool:
    if host in (None, "", "localhost", b"localhost"):
        return True
    try:
        address = ipaddress.ip_address(host.decode() if isinstance(host, bytes) else host)
    except ValueError:  # a host name
        return False
    return address.is_loopback or address.is_unspecified


def _hook(event: str, arguments: tuple) -> None:
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):  # not a Unix socket
        host = arguments[1][0]
    else:
        return
    if not _is_local(host):
        raise PermissionError(f"{event} to {host}: tests do not use the network")


def forbid() -> None:
    """Block connections to other machines from this process and its forks."""
    sys.addaudithook(_hook)
