"""No test talks to another machine: whoever tries is stopped, with the name of what was wanted."""

import ipaddress
import sys


def _is_here(host) -> bool:
    if host in (None, "", "localhost", b"localhost"):
        return True
    try:
        address = ipaddress.ip_address(host.decode() if isinstance(host, bytes) else host)
    except ValueError:  # a name, which another machine would be asked for
        return False
    return address.is_loopback or address.is_unspecified


def _hook(event: str, arguments: tuple) -> None:
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):  # of a Unix socket it is a path
        host = arguments[1][0]
    else:
        return
    if not _is_here(host):
        raise PermissionError(f"{event} to {host}: tests do not use the network")


def forbid() -> None:
    """Stop this process, and what is forked from it, from talking to other machines."""
    sys.addaudithook(_hook)
