"""Two hosts on one machine: a network namespace each, joined by a cable, and by another one to where the tests run.

Namespaces have interfaces, addresses and loopbacks of their own, so whatever is started in them finds the other host
over the network or not at all. It takes root, or CAP_NET_ADMIN and CAP_SYS_ADMIN.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

HOSTS = {"a": "10.77.0.1", "b": "10.77.0.2"}
OUTSIDE, INSIDE = "10.78.0.1", "10.78.0.2"
"""The cable from the tests to host a: its two ends."""


class TwoHosts:
    """Hosts a and b; `address` is where the tests reach host a."""

    address = INSIDE

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs: list[subprocess.Popen[bytes]] = []
        self._run = secrets.token_hex(2)
        self.names = names_of(self._run)
        in_own_process("set_up", self._run)

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
        in_own_process("take_down", self._run)


def why_not() -> str | None:
    """Why there can be no hosts here; None if there can."""
    run = secrets.token_hex(2)
    try:
        in_own_process("set_up", run)
        in_own_process("take_down", run)
    except subprocess.CalledProcessError as error:
        return f"no network namespaces can be made and joined here: {error.stderr.strip().splitlines()[-1]}"
    return None


def in_own_process(call: str, run: str) -> None:
    """Calls a function below elsewhere: pyroute2 leaves sockets open, which the tests take for a mistake of ours."""
    command = [sys.executable, __file__, call, run]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)


def names_of(run: str) -> dict[str, str]:
    """The namespaces of the hosts."""
    return {host: f"aios-{run}-{host}" for host in HOSTS}


def set_up(run: str) -> None:
    """Makes the namespaces and the cables."""
    from pyroute2 import NDB, netns

    names = names_of(run)
    for name in names.values():
        netns.create(name)
    with NDB() as ndb:
        for name in names.values():
            ndb.sources.add(netns=name)
        _cable(ndb, f"ab{run}", f"ba{run}", names["a"], names["b"], HOSTS["a"], HOSTS["b"])
        _cable(ndb, f"out{run}", f"in{run}", "localhost", names["a"], OUTSIDE, INSIDE)
        for name in names.values():
            ndb.interfaces[{"target": name, "ifname": "lo"}].set("state", "up").commit()


def take_down(run: str) -> None:
    """Removes the namespaces, and with them the cables."""
    from pyroute2 import netns

    for name in names_of(run).values():
        netns.remove(name)


def _cable(ndb, left: str, right: str, left_host: str, right_host: str, *addresses: str) -> None:
    """A pair of interfaces, one in each namespace ("localhost": where the tests run)."""
    ndb.interfaces.create(ifname=left, kind="veth", peer=right).commit()
    for ifname, host, address in zip((left, right), (left_host, right_host), addresses, strict=True):
        if host != "localhost":
            ndb.interfaces[{"target": "localhost", "ifname": ifname}].set("net_ns_fd", host).commit()
            ndb.interfaces.wait(target=host, ifname=ifname)
        ndb.interfaces[{"target": host, "ifname": ifname}].add_ip(f"{address}/24").set("state", "up").commit()


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


if __name__ == "__main__":
    {"set_up": set_up, "take_down": take_down}[sys.argv[1]](sys.argv[2])
