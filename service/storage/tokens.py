"""Access tokens. What opens the door is known to its holder alone; here is its digest."""

import hashlib
import re
import secrets
from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Select, or_, select
from sqlalchemy.orm import Session

from coterie.service.auth import Role
from coterie.service.storage.repositories import NotFound
from coterie.service.storage.tables import TokenRow

ID_BYTES = 8
SECRET_BYTES = 32
_TOKEN = re.compile(r"coterie_([0-9a-f]{16})_[0-9A-Za-z_-]{43}")


def id_in(token: str) -> str | None:
    """The id that a token names; None where the text has not the shape of a token."""
    found = _TOKEN.fullmatch(token)
    return f"token_{found[1]}" if found else None


def digest_of(token: str) -> str:
    """What is stored of a token.

    A fast hash, and no salt: slow ones guard passwords, which can be guessed. Among 2^256 secrets nobody
    guesses, however fast. And what is compared by the index is a digest, so its timing tells nothing of a
    token.
    """
    return hashlib.sha256(token.encode()).hexdigest()


class TokenRepository:
    """Tokens. None is ever deleted, so that the audit log's ids mean something.

    Args:
        session: The transaction.
        tenant: Whose tokens there are; None for all, as for the operator.
    """

    def __init__(self, session: Session, tenant: str | None = None) -> None:
        self._session = session
        self._tenant = tenant

    def create(
        self, tenant: str, role: Role, name: str, expires_at: datetime | None, now: datetime
    ) -> tuple[TokenRow, str]:
        """Make a token: its row, and the token itself, which nobody can read again."""
        number = secrets.token_hex(ID_BYTES)
        token = f"coterie_{number}_{secrets.token_urlsafe(SECRET_BYTES)}"
        row = TokenRow(
            id=f"token_{number}",
            tenant=tenant,
            role=role,
            name=name,
            digest=digest_of(token),
            created_at=now,
            expires_at=expires_at,
        )
        self._session.add(row)
        self._session.flush()
        return row, token

    def find(self, token: str) -> TokenRow | None:
        """The row of a token, usable or not; None where there is none."""
        return self._session.scalar(self._own().where(TokenRow.digest == digest_of(token)))

    def exist(self) -> bool:
        """Whether there is any, revoked and expired ones included."""
        return self._session.scalar(self._own().limit(1)) is not None

    def any_usable(self, now: datetime) -> bool:
        """Whether any opens the door."""
        usable = TokenRow.revoked_at.is_(None) & or_(TokenRow.expires_at.is_(None), TokenRow.expires_at > now)
        return self._session.scalar(self._own().where(usable).limit(1)) is not None

    def get(self, token_id: str) -> TokenRow:
        """One token's row.

        Raises:
            NotFound: If there is none with this id.
        """
        row = self._session.scalar(self._own().where(TokenRow.id == token_id))
        if row is None:
            raise NotFound(f"there is no token {token_id}")
        return row

    def page(self, *, before: int | None, limit: int) -> Sequence[TokenRow]:
        """Up to `limit` tokens of lower position than `before`, newest first."""
        query = self._own().order_by(TokenRow.position.desc()).limit(limit)
        if before is not None:
            query = query.where(TokenRow.position < before)
        return self._session.scalars(query).all()

    def _own(self) -> Select[TokenRow]:
        query = select(TokenRow)
        return query if self._tenant is None else query.where(TokenRow.tenant == self._tenant)
