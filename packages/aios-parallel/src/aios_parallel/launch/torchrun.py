"""Ranks that torchrun has started, on one host or several: they meet where torchrun's own processes meet.

torchrun gives every process its number and the address of a store. The driver leaves there where it listens, and looks
after the group from then on: torchrun only sees to it that the processes are there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from aios_model.errors import ConfigError
from aios_parallel.errors import ParallelError
from aios_parallel.launch.listening import connect_to_driver

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

    from aios_parallel.control.connection import Connection

_KEY = "aios/driver"
_STORE_SECONDS = 60.0
_ATTEMPT_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchrunPlace:
    """What torchrun tells a process.

    Attributes:
        rank: Its number, from 0.
        world_size: How many there are.
        master_addr: Address of the host of rank 0.
        master_port: Port of the store there.
        has_store: Whether torchrun runs the store; else rank 0 opens it.
    """

    rank: int
    world_size: int
    master_addr: str
    master_port: int
    has_store: bool

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> TorchrunPlace | None:
        """Reads what torchrun sets; None in a process that it did not start.

        Raises:
            ConfigError: A variable is missing or is no number.
        """
        if "TORCHELASTIC_RUN_ID" not in environment:
            return None
        try:
            return cls(
                rank=int(environment["RANK"]),
                world_size=int(environment["WORLD_SIZE"]),
                master_addr=environment["MASTER_ADDR"],
                master_port=int(environment["MASTER_PORT"]),
                has_store=environment.get("TORCHELASTIC_USE_AGENT_STORE", "True") == "True",
            )
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"torchrun's environment is incomplete: {error}; start all ranks with torchrun"
            ) from error

    def open_store(self) -> TCPStore:
        """Connects to the store. Imports torch."""
        from torch._C._distributed_c10d import TCPStore

        is_master = self.rank == 0 and not self.has_store
        timeout = timedelta(seconds=_STORE_SECONDS)
        try:
            return TCPStore(
                self.master_addr, self.master_port, is_master=is_master, timeout=timeout, wait_for_workers=False
            )
        except RuntimeError as error:
            where = f"{self.master_addr}:{self.master_port}"
            raise ParallelError(f"torchrun's store at {where} cannot be reached: {error}") from error


def publish_driver(store: TCPStore, address: str, port: int, token: str) -> None:
    """Says where the driver listens; of several, the last one counts."""
    store.set(_KEY, json.dumps({"address": address, "port": port, "token": token}))


def find_driver(place: TorchrunPlace, *, token: str, timeout: float) -> Connection:
    """Joins the driver, as soon as there is one.

    Args:
        place: Of the caller.
        token: The run's; empty for the one that the driver has left in the store, which whoever reaches the store may
            read.
        timeout: Seconds to wait.

    Raises:
        ParallelError: No driver came, or it does not know the token.
    """
    store = place.open_store()
    deadline = time.monotonic() + timeout
    while True:
        try:
            store.wait([_KEY], timedelta(seconds=max(0.1, deadline - time.monotonic())))
            driver = json.loads(store.get(_KEY))
            address = (driver["address"], int(driver["port"]))
            return connect_to_driver(address, token or driver["token"], rank=place.rank, timeout=_ATTEMPT_SECONDS)
        except (ParallelError, RuntimeError) as error:
            # The driver of before may be gone, and the next one not there yet.
            if time.monotonic() > deadline:
                raise ParallelError(f"rank {place.rank} found no driver in {timeout:g} s: {error}") from error
            time.sleep(_ATTEMPT_SECONDS / 4)
