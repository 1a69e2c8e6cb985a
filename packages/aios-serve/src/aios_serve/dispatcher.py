"""Which replica runs which request: new ones go where the policy says, and those whose replica died to another one.

A request that has produced nothing yet is the same request anywhere: it carries its seed, and its answer does not
depend on what else runs. So it is moved, and its client notices nothing but the time. It is moved once only, because it
may be what killed its replica.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aios_sched.routing.base import RoutedRequest
from aios_serve.errors import EngineRestartingError
from aios_serve.messages import Abort
from aios_serve.supervisor import EngineState

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aios_sched.routing.router import Router
    from aios_serve.messages import Command
    from aios_serve.open_request import OpenRequest
    from aios_serve.supervisor import EngineSupervisor

logger = logging.getLogger(__name__)

MOST_MOVES = 1
WAIT_SECONDS = 30.0
"""That a request whose replica died waits for another one to come up."""


class Dispatcher:
    """Places open requests on replicas.

    Args:
        router: Chooses replicas, which are those that take requests, and keeps account of their load.
        supervisors: The replicas by number.
        wait_seconds: How long a request may wait for a replica once it has lost its own.
    """

    def __init__(
        self, router: Router, supervisors: Sequence[EngineSupervisor], *, wait_seconds: float = WAIT_SECONDS
    ) -> None:
        self._router = router
        self._supervisors = supervisors
        self._wait_seconds = wait_seconds
        self._waiting: dict[str, _Waiting] = {}
        self._most_moves = 0 if len(supervisors) == 1 else MOST_MOVES  # to wait for a restart alone helps nobody
        self.num_moves = 0

    @property
    def num_ready(self) -> int:
        """Replicas that take requests."""
        return len(self._router.loads)

    def add(self, replica: int) -> None:
        """A replica takes requests from now on; those that wait for one get theirs."""
        self._router.add(replica)
        waiting, self._waiting = self._waiting, {}
        for each in waiting.values():
            each.timer.cancel()
            self.place(each.request)

    def remove(self, replica: int) -> None:
        """A replica takes no requests any more. Nobody waits if none will come up."""
        if replica in self._router.loads:
            self._router.remove(replica)
        if not self._has_prospects():
            for each in list(self._waiting.values()):
                each.timer.cancel()
                each.give_up()

    def forget_cache(self, replica: int) -> None:
        """Its prefix cache was emptied."""
        if replica in self._router.loads:
            self._router.forget_cache(replica)

    def place(self, request: OpenRequest) -> None:
        """Route a request and send it.

        Raises:
            EngineRestartingError: no replica takes requests at the moment.
        """
        add = request.add_request
        request.ticket = self._router.route(
            RoutedRequest(
                prompt_token_ids=add.prompt_token_ids,
                max_tokens=add.params.max_tokens,
                num_choices=len(add.children),
                session=request.session,
                cache_salt=add.cache_salt,
            )
        )
        if request.ticket is None:
            raise EngineRestartingError("no engine takes requests at the moment")
        request.replica = request.ticket.replica
        self.send(request.replica, add)

    def move(self, request: OpenRequest, give_up: Callable[[], None]) -> bool:
        """Give a request whose replica died to another one, or let it wait for one.

        Args:
            request: Is at a replica that was removed.
            give_up: Called if no replica comes up in time.

        Returns:
            Whether that is possible: there are several replicas, one of them is up or will be, and the request has
            produced nothing yet and was not moved before.
        """
        begun = request.first_token_time is not None
        if begun or request.num_moves >= self._most_moves or not self._has_prospects():
            return False
        request.num_moves += 1
        self.num_moves += 1
        if self.num_ready:
            self.place(request)
            return True
        request.ticket = None
        timer = asyncio.get_running_loop().call_later(self._wait_seconds, give_up)
        self._waiting[request.key] = _Waiting(request, timer, give_up)
        return True

    def stop_moving(self) -> None:
        """From now on a request ends with its replica."""
        self._most_moves = 0

    def note_first_token(self, request: OpenRequest) -> None:
        """Its prompt has been computed. Saying so twice is fine."""
        if request.ticket is not None:
            self._router.note_first_token(request.ticket)

    def finish(self, request: OpenRequest) -> None:
        """It ended, for whatever reason. Saying so twice is fine."""
        waiting = self._waiting.pop(request.key, None)
        if waiting is not None:
            waiting.timer.cancel()
        if request.ticket is not None:
            self._router.finish(request.ticket)

    def send(self, replica: int, command: Command) -> None:
        """Hand a command to one replica."""
        self._supervisors[replica].send(command)

    def abort(self, request: OpenRequest, engine_ids: list[str]) -> None:
        """End these choices of a request where they run."""
        if request.key not in self._waiting:
            self.send(request.replica, Abort(engine_ids=engine_ids))

    def _has_prospects(self) -> bool:
        return any(each.state is not EngineState.DEAD for each in self._supervisors)


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A request without a replica."""

    request: OpenRequest
    timer: asyncio.TimerHandle
    give_up: Callable[[], None]
