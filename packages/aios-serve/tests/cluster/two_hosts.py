"""Two hosts on one machine: a network namespace each, joined by a cable, and by another one to where the tests run.

Namespaces have interfaces, addresses and loopbacks of their own, so whatever is started in them finds the other host
over the network or not at all. It takes root, or CAP_NET_ADMIN and CAP_SYS_ADMIN.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from pyroute2 import NDB, netns
from pyroute2.netlink.exceptions import NetlinkError

HOSTS = {"a": "10.77.0.1", "b": "10.77.0.2"}
OUTSIDE, INSIDE = "10.78.0.1", "10.78.0.2"
"""The cable from the tests to host a: its two ends."""


class TwoHosts:
    """Hosts a and b; `address` is where the tests reach host a."""

    address = INSIDE

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs: list[subprocess.Popen[bytes]] = []
        run = secrets.token_hex(2)
        self.names = {host: f"aios-{run}-{host}" for host in HOSTS}
        for name in self.names.values():
            netns.create(name)
        with NDB() as ndb:
            for name in self.names.values():
                ndb.sources.add(netns=name)
            self._cable(ndb, f"ab{run}", f"ba{run}", "a", "b", HOSTS["a"], HOSTS["b"])
            self._cable(ndb, f"out{run}", f"in{run}", None, "a", OUTSIDE, INSIDE)
            for name in self.names.values():
                ndb.interfaces[{"target": name, "ifname": "lo"}].set("state", "up").commit()

    def start(self, host: str, *command: str, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Starts a program on a host, in a session of its own; what it says goes to `log`."""
        words = ["nsenter", f"--net=/run/netns/{self.names[host]}", "--", *map(str, command)]
        with self.log(len(self.programs)).open("wb") as log:
            program = subprocess.Popen(
                words,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.programs.append(program)
        return program

    def log(self, program: int) -> Path:
        """What the program of that number said."""
        return self.folder / f"program-{program}.log"

    def said(self) -> str:
        """The end of what each program said."""
        return "\n".join(self.log(i).read_text(errors="replace")[-3000:] for i in range(len(self.programs)))

    def pids(self, host: str, words: str) -> list[int]:
        """Processes on a host whose command line contains `words`."""
        return [pid for pid in netns_pids(self.names[host]) if words in command_line(pid)]

    def close(self) -> None:
        """Ends whatever runs on the hosts, and takes them away."""
        for program in self.programs:
            program.terminate()
        deadline = time.monotonic() + 5
        while any(netns_pids(name) for name in self.names.values()) and time.monotonic() < deadline:
            time.sleep(0.1)
        for name in self.names.values():
            for pid in netns_pids(name):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for program in self.programs:
            program.wait(5)
        for name in self.names.values():
            netns.remove(name)

    def _cable(self, ndb: NDB, left: str, right: str, left_host: str | None, right_host: str, *addresses: str) -> None:
        """A pair of interfaces, one on each host (None: where the tests run)."""
        ndb.interfaces.create(ifname=left, kind="veth", peer=right).commit()
        for ifname, host, address in zip((left, right), (left_host, right_host), addresses, strict=True):
            target = "localhost" if host is None else self.names[host]
            if host is not None:
                ndb.interfaces[{"target": "localhost", "ifname": ifname}].set("net_ns_fd", target).commit()
                ndb.interfaces.wait(target=target, ifname=ifname)
            ndb.interfaces[{"target": target, "ifname": ifname}].add_ip(f"{address}/24").set("state", "up").commit()


def why_not() -> str | None:
    """Why there can be no hosts here; None if there can."""
    name = f"aios-{secrets.token_hex(2)}-try"
    try:
        netns.create(name)
        netns.remove(name)
    except (OSError, NetlinkError) as error:
        return f"no network namespace can be made here ({error})"
    return None


def netns_pids(name: str) -> list[int]:
    """Processes in a network namespace."""
    with suppress(OSError):
        inode = Path(f"/run/netns/{name}").stat().st_ino
        return [int(folder.name) for folder in Path("/proc").glob("[0-9]*") if _inode(folder / "ns/net") == inode]
    return []


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None
