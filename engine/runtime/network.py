"""Network interfaces of this machine, by name and by IPv4 address, and how many connections there may be."""

from __future__ import annotations

import fcntl
import resource
import socket
import struct

from engine.errors import InputError

LOCALHOST = "127.0.0.1"  # what is on one machine listens to no other
_SIOCGIFADDR = 0x8915  # Linux: an interface's address


def address_of(interface: str) -> str:
    """Return an interface's IPv4 address. Raises InputError if it has none, or there is no such interface."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError as error:
            names = ", ".join(name for _, name in socket.if_nameindex())
            raise InputError(
                f"distributed_interface {interface!r} ({error.strerror}): give one with an address of {names}"
            ) from None
    return socket.inet_ntoa(found[20:24])


def interface_of(address: str) -> str | None:
    """Return the interface that has an IPv4 address; None if none has."""
    for _, name in socket.if_nameindex():
        try:
            if address_of(name) == address:
                return name
        except InputError:  # one without an address
            continue
    return None


def allow_connections() -> None:
    """Let this process have as many open files, sockets among them, as it may: usual is 1024, allowed are more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
