"""A Ray cluster of one node and a Ray Serve application on it, both as the programs that an operator starts.

They are processes of their own: this one never imports Ray. Everything that a program starts stays in its session, by
which it is found again.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

BIN = Path(sys.executable).parent


class LocalCluster:
    """Ray's head, and whatever it starts."""

    def __init__(self, num_cpus: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # paths of sockets must be short
        token = self.folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.address = f"127.0.0.1:{free_port()}"
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_ADDRESS": self.address,
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        options = {
            "--port": self.address.rpartition(":")[2],
            "--ray-client-server-port": str(free_port()),
            "--dashboard-port": str(free_port()),
            "--temp-dir": str(self.folder / "r"),
            "--include-dashboard": "false",
            "--num-cpus": str(num_cpus),
            "--object-store-memory": str(100 * 2**20),
        }
        environment = {name: value for name, value in self.environment.items() if name != "RAY_ADDRESS"}
        self.head = Program("ray", "start", "--head", "--block", *flat(options), env=environment, folder=self.folder)
        self.programs = [self.head]
        self.wait_until(lambda: self.run("ray", "status").returncode == 0, 60)

    def start(self, *command: str) -> Program:
        """Start a program that talks to the cluster."""
        self.programs.append(Program(*command, env=self.environment, folder=self.folder))
        return self.programs[-1]

    def run(self, *command: str) -> subprocess.CompletedProcess[bytes]:
        """Run a program that talks to the cluster, to its end."""
        return subprocess.run([BIN / command[0], *command[1:]], env=self.environment, capture_output=True, check=False)

    def pids(self, title: str) -> set[int]:
        """Processes of the cluster whose command line contains `title`."""
        return {pid for pid in members(self.head.process.pid) if title in command_line(pid)}

    def wait_until(self, condition, seconds: float) -> None:
        """Fail with what the programs said if `condition` does not hold in time."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.said()
            assert all(program.process.poll() is None for program in self.programs), self.said()
            time.sleep(0.1)

    def said(self) -> str:
        """The end of what each program said."""
        return "\n".join(program.log.read_text(errors="replace")[-6000:] for program in self.programs)

    def stop(self) -> None:
        """End it; Ray's daemons, which outlive SIGTERM by a minute, are killed by their ids."""
        for program in self.programs[:0:-1]:
            program.process.send_signal(signal.SIGINT)
            wait_for(lambda program=program: program.process.poll() is not None, 10)
        for program in self.programs:
            for pid in members(program.process.pid):
                if "aios_serve.engine_process" not in command_line(pid):  # an engine has to leave by itself
                    kill(pid)
            program.process.wait(5)


class Program:
    """A program in a session of its own."""

    def __init__(self, *command: str, env: dict[str, str], folder: Path) -> None:
        self.log = folder / f"{command[0]}-{secrets.token_hex(4)}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [BIN / command[0], *command[1:]], env=env, stdout=log, stderr=log, start_new_session=True
            )


def members(session: int) -> set[int]:
    """Processes of a session that are not zombies."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, _, _, sid = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(sid) == session and state != "Z":
                found.add(int(folder.name))
    return found


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def wait_for(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def flat(options: dict[str, str]) -> list[str]:
    return [word for pair in options.items() for word in pair]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
