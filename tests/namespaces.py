"""Two hosts for tests: two network namespaces joined by a pair of virtual interfaces.

A namespace is held by a process and named by its number, so nothing is left when that process ends, however it ends.
The fixture `hosts` skips, and says why, where this machine does not let us make networks.
"""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest

ADDRESSES = ("10.83.0.1", "10.83.0.2")  # in namespaces of their own: they clash with nothing
INTERFACES = ("host0", "host1")
LIMIT = 20.0  # seconds for a command of a few milliseconds


class NoNamespaces(Exception):
    """This machine does not let us make networks."""


class Host(NamedTuple):
    """A network namespace: the process that holds it and the command that enters it."""

    holder: "subprocess.Popen[bytes]"
    enter: tuple[str, ...]


@contextlib.contextmanager
def _host(unshare: Sequence[str], enter: Sequence[str]) -> Iterator[Host]:
    """A new namespace, which lives as long as its holder: `cat`, which ends at the latest when this process does."""
    command = [*unshare, "sh", "-c", "echo ready && exec cat"]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert holder.stdin is not None and holder.stdout is not None
    try:
        said = holder.stdout.readline().decode().strip()
        if said != "ready":
            raise NoNamespaces(f"`{' '.join(unshare)}` says: {said}")
        yield Host(holder, ("nsenter", "-t", str(holder.pid), *enter))
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()


def _configure(host: Host, *words: str) -> None:
    done = subprocess.run([*host.enter, "ip", *words], capture_output=True, timeout=LIMIT, text=True)
    if done.returncode:
        raise NoNamespaces(f"`ip {' '.join(words)}` says: {done.stderr.strip()}")


@contextlib.contextmanager
def _two_hosts(privileged: bool) -> Iterator[tuple[Host, Host]]:
    """Two joined hosts; by root's own right, or else in a user namespace where this process may do as root does."""
    if missing := [name for name in ("ip", "unshare", "nsenter") if not shutil.which(name)]:
        raise NoNamespaces(f"no command {' and '.join(missing)}")
    user = [] if privileged else ["--user", "--preserve-credentials"]
    with contextlib.ExitStack() as stack:
        unshare = ["unshare", "--net"] if privileged else ["unshare", "--user", "--map-root-user", "--net"]
        one = stack.enter_context(_host(unshare, [*user, "--net"]))
        # The second host belongs to the first one's user namespace; entered with that one's users, it is as much ours.
        inside = [] if privileged else ["nsenter", "-t", str(one.holder.pid), *user]
        other = stack.enter_context(_host([*inside, "unshare", "--net"], [*user, "--net"]))
        # Each end is made where it belongs: no name on the way could be taken.
        peer = ["peer", "name", INTERFACES[1], "netns", str(other.holder.pid)]
        _configure(one, "link", "add", INTERFACES[0], "type", "veth", *peer)
        for host, interface, address in zip((one, other), INTERFACES, ADDRESSES, strict=True):
            _configure(host, "address", "add", f"{address}/24", "dev", interface)
            for link in ("lo", interface):
                _configure(host, "link", "set", link, "up")
        yield one, other


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    if sys.platform != "linux":
        pytest.skip("network namespaces are Linux's")
    reasons = []
    for privileged in (True, False):
        with contextlib.ExitStack() as stack:
            try:
                pair = stack.enter_context(_two_hosts(privileged))
            except (NoNamespaces, subprocess.TimeoutExpired) as reason:
                reasons.append(str(reason))
                continue
            yield pair
            return
    pytest.skip(f"no network namespaces here: as this user {reasons[0]}; in a user namespace {reasons[1]}")
