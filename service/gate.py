"""Who comes in: tokens looked up and remembered for moments, and their requests counted."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from coterie.service.auth import ANYONE, Caller, Role
from coterie.service.storage.database import Database
from coterie.service.storage.tokens import TokenRepository, digest_of, id_in

# A request costs no query, and a token that is revoked or made counts within so long on every server.
CACHE_SECONDS = 5.0
# So long a token may save up what it does not use of its rate, for the bursts that a page or a script sends.
BURST_SECONDS = 5.0
logger = logging.getLogger(__name__)


class TooManyRequests(Exception):
    """A token made more requests than it may.

    Attributes:
        retry_seconds: After so long the next one is answered.
        burst: So many may come at once,
        window_seconds: and again after so long.
    """

    def __init__(self, retry_seconds: float, burst: int, window_seconds: float) -> None:
        super().__init__(
            f"this token may make {burst / window_seconds:g} requests a second, and {burst:,} at once: "
            f"wait {math.ceil(retry_seconds)} s"
        )
        self.retry_seconds = retry_seconds
        self.burst = burst
        self.window_seconds = window_seconds


@dataclass(frozen=True)
class _Remembered:
    caller: Caller
    expires_at: datetime | None
    forgotten_at: float


class Gate:
    """Says whose a token is, and how often it may come.

    The server is open, all callers being `ANYONE`, until the first token is made; revoked and expired ones
    keep it closed. What is counted is counted by this server alone, in its memory: behind several servers a
    token may make as many times more requests, and a restart forgets them.

    Args:
        database: Where the tokens are.
        requests_per_second: Of one token, on average; None is without limit.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        database: Database,
        requests_per_second: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._clock = clock
        self._rate = requests_per_second
        self._burst = 1 if self._rate is None else max(1, math.floor(self._rate * BURST_SECONDS))
        self._required = False  # once True, for good
        self._open_until = -math.inf
        self._changes = 0  # of tokens on this server
        self._remembered: dict[str, _Remembered] = {}  # by digest; only tokens that were good
        self._due: dict[str, float] = {}  # by token's id: when all its requests so far are paid for

    def recall(self, token: str | None) -> Caller | None:
        """Whose a token is, as far as is remembered. Does not block."""
        if self._clock() < self._open_until:
            return ANYONE
        found = None if token is None else self._remembered.get(digest_of(token))
        if found is None or found.forgotten_at <= self._clock():
            return None
        return None if _expired(found.expires_at) else found.caller

    def look_up(self, token: str | None) -> Caller | None:
        """Whose a token is; None where it opens nothing. Asks the database.

        Raises:
            DatabaseUnavailable: If that does not answer.
        """
        forgotten_at, changes = self._clock() + CACHE_SECONDS, self._changes
        token_id = None if token is None else id_in(token)
        with self._database.read() as session:
            tokens = TokenRepository(session)
            if not self._required:
                self._required = tokens.exist()
                if not self._required:
                    if changes == self._changes:
                        self._open_until = forgotten_at
                    return ANYONE
            if token is None or token_id is None:
                return None
            row = tokens.find(token)
        digest = digest_of(token)
        if row is None or row.revoked_at is not None or _expired(row.expires_at):
            self._remembered.pop(digest, None)
            fault = "not known" if row is None else "revoked" if row.revoked_at is not None else "expired"
            logger.warning("%s was refused: it is %s", token_id, fault)
            return None
        caller = Caller(row.tenant, Role(row.role), row.id)
        if changes == self._changes:  # or what was read may be out of date
            self._remembered[digest] = _Remembered(caller, row.expires_at, forgotten_at)
        return caller

    def forget(self) -> None:
        """Look tokens up anew: one was made or revoked here, which then counts at once."""
        self._changes += 1
        self._open_until = -math.inf
        self._remembered.clear()

    def count(self, caller: Caller) -> None:
        """Count a request. To be called on the event loop alone.

        Generic cell rate algorithm (ATM Forum, 1996): a token bucket that is kept as one number.

        Raises:
            TooManyRequests: If the token has used up its burst.
        """
        if self._rate is None or caller.token_id is None:
            return
        now = self._clock()
        due = max(now, self._due.get(caller.token_id, now))
        wait = due - now - (self._burst - 1) / self._rate
        if wait > 0:
            raise TooManyRequests(wait, self._burst, self._burst / self._rate)
        self._due[caller.token_id] = due + 1 / self._rate


def _expired(expires_at: datetime | None) -> bool:
    return expires_at is not None and expires_at <= datetime.now(UTC)
