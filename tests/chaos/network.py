"""A network in which each machine of a simulated cluster has an address and a cable of its own.

Network namespaces behind one bridge (ip-netns(8), bridge(8)); it takes root and Linux.
"""

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator

from ray.util import get_node_ip_address

_NEW_NET, _NEW_HOSTNAME = 0x40000000, 0x04000000
_SUBNET = "10.77.0"


class Network:
    """Machines 0 to `num_machines` - 1, whose cables can be pulled."""

    def __init__(self, num_machines: int):
        self.addresses = [f"{_SUBNET}.{number + 2}" for number in range(num_machines)]

    @contextlib.contextmanager
    def inside(self, number: int) -> Iterator[str]:
        """Processes that are started in the block are on that machine; its address."""
        here = [os.open(f"/proc/self/ns/{kind}", os.O_RDONLY) for kind in ("net", "uts")]
        there = os.open(f"/run/netns/{_name(number)}", os.O_RDONLY)
        address = self.addresses[number]
        try:
            _call("setns", there, _NEW_NET)
            # Gloo listens where the host's name leads, and here that is the address.
            _call("unshare", _NEW_HOSTNAME)
            _call("sethostname", address.encode(), len(address))
            yield address
        finally:
            _call("setns", here[0], _NEW_NET)
            _call("setns", here[1], _NEW_HOSTNAME)
            for handle in (*here, there):
                os.close(handle)

    @contextlib.contextmanager
    def cut_off(self, number: int) -> Iterator[None]:
        """Nobody reaches the machine, and it reaches nobody."""
        _ip("link", "set", _name(number), "down")
        try:
            yield
        finally:
            _ip("link", "set", _name(number), "up")

    @contextlib.contextmanager
    def cut_between(self) -> Iterator[None]:
        """The machines do not reach one another, and all of them reach the head."""
        self._isolate("on")
        try:
            yield
        finally:
            self._isolate("off")

    def _isolate(self, how: str) -> None:
        for number in range(len(self.addresses)):
            _ip("link", "set", "dev", _name(number), "type", "bridge_slave", "isolated", how)


@contextlib.contextmanager
def network(num_machines: int) -> Iterator[Network]:
    """Makes a network, and takes it away.

    Raises:
        OSError, CalledProcessError: this process may not.
    """
    made = Network(num_machines)
    with contextlib.ExitStack() as stack:
        bridge = f"shb{os.getpid()}"
        _ip("link", "add", bridge, "type", "bridge")
        stack.callback(_ip, "link", "del", bridge)
        _ip("addr", "add", f"{_SUBNET}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for number, address in enumerate(made.addresses):
            name = _name(number)
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
            _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", name, "master", bridge, "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")
            # Nothing else is to be reached: what asks for a name would wait long for no answer.
            _ip("-n", name, "route", "add", get_node_ip_address(), "via", f"{_SUBNET}.1")
        yield made


def _name(number: int) -> str:
    return f"sh{number}x{os.getpid()}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _call(function: str, *arguments: bytes | int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, function)(*arguments):
        raise OSError(ctypes.get_errno(), f"{function}{arguments}")
