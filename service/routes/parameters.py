"""Parameters that several endpoints take. One that an endpoint does not know is refused."""

from typing import Annotated

from fastapi import Depends, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from coterie.search.plan import Fault
from coterie.search.spec import ConstraintSpec
from coterie.service.body import LIMIT_POINTER
from coterie.service.context import Context
from coterie.service.cursors import InvalidQuery

JobId = Annotated[str, Path(pattern="^job_[0-9A-Za-z_-]{1,60}$", description="Id of a job.")]
TrialId = Annotated[str, Path(pattern="^trial_[0-9A-Za-z_-]{1,90}$", description="Id of a trial.")]


def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


ContextOf = Annotated[Context, Depends(_context)]


def _refuse_query(request: Request) -> None:
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
        default=None, max_length=200, description="The next_cursor of the page before."
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
