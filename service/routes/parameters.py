"""Parameters that several endpoints take. One that an endpoint does not know is refused."""

from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Annotated

from fastapi import Depends, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from coterie.search.faults import Fault
from coterie.search.spec import ConstraintSpec
from coterie.service.auth import Caller, Forbidden, Role
from coterie.service.body import LIMIT_POINTER
from coterie.service.context import Context
from coterie.service.cursors import InvalidQuery
from coterie.service.routes.authentication import AUTHENTICATED

JobId = Annotated[str, Path(pattern="^job_[0-9A-Za-z_-]{1,60}$", description="Id of a job.")]
TrialId = Annotated[str, Path(pattern="^trial_[0-9A-Za-z_-]{1,90}$", description="Id of a trial.")]


def _context_for(role: Role) -> Callable[[Request, Caller], Coroutine[None, None, Context]]:
    """The server's context with who asks, who must have this role."""

    async def context_of(request: Request, caller: Annotated[Caller, AUTHENTICATED]) -> Context:
        if not caller.role.includes(role):
            raise Forbidden(f"this takes a token of role {role}, and yours has {caller.role}")
        context: Context = request.app.state.context
        return replace(context, caller=caller)

    return context_of


async def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


# Each endpoint says by its context what its caller must be. Nobody in particular: whoever watches the server.
OpenContext = Annotated[Context, Depends(_context)]
ContextOf = Annotated[Context, Depends(_context_for(Role.READER))]
SubmitterContext = Annotated[Context, Depends(_context_for(Role.SUBMITTER))]
AdminContext = Annotated[Context, Depends(_context_for(Role.ADMIN))]


async def _refuse_query(request: Request) -> None:
    if request.query_params:
        raise InvalidQuery(
            [
                Fault(f"/query/{name[:LIMIT_POINTER]}", "this endpoint takes no query parameters")
                for name in request.query_params
            ]
        )


NO_QUERY = Depends(_refuse_query)


class Parameters(BaseModel):
    """Of one endpoint; others are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class PageParameters(Parameters):
    """Which part of a list."""

    limit: int = Field(default=50, ge=1, le=1000, description="Greatest number of items.")
    cursor: str | None = Field(
        default=None, max_length=250, description="The next_cursor of the page before."
    )


class LimitParameters(Parameters):
    """What a network may cost."""

    max_macs: float | None = Field(default=None, ge=0, description="Greatest number of multiply-accumulates.")
    max_params: float | None = Field(default=None, ge=0, description="Greatest number of parameters.")
    max_latency_ms: float | None = Field(default=None, ge=0, description="Greatest latency, in milliseconds.")

    def limits(self) -> list[ConstraintSpec]:
        """Those that were given."""
        bounds = {"macs": self.max_macs, "params": self.max_params, "latency_ms": self.max_latency_ms}
        return [
            ConstraintSpec(metric=metric, max=bound) for metric, bound in bounds.items() if bound is not None
        ]


PageQuery = Annotated[PageParameters, Query()]
