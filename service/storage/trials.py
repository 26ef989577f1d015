"""Trials as they are read. A repository lives within the caller's transaction."""

from collections.abc import Iterator, Sequence
from functools import cache
from operator import itemgetter
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Double,
    FromClause,
    Select,
    Text,
    bindparam,
    cast,
    func,
    select,
    tuple_,
)
from sqlalchemy.orm import Session

from coterie.search.spec import ConstraintSpec
from coterie.search.store import TrialState
from coterie.service.documents import parse
from coterie.service.storage import shown
from coterie.service.storage.repositories import found
from coterie.service.storage.shown import ShownRow
from coterie.service.storage.tables import (
    ON_FRONT,
    FrontHistoryRow,
    JobRow,
    MeasurementRow,
    TrialRow,
    TrialValueRow,
)

NUMBERS_AT_A_TIME = 1000  # far below what a statement may hold
# Plain tables: rows made into objects, as an update needs them, take a multiple of the time.
_JOBS, _TRIALS, _VALUES, _HISTORY, _MEASUREMENTS = (
    row.metadata.tables[row.__tablename__]
    for row in (JobRow, TrialRow, TrialValueRow, FrontHistoryRow, MeasurementRow)
)


class TrialRepository:
    """Trials, their measurements, and the front that they make.

    Only `get` looks at whose they are: what takes a job's id is asked after the job was found.

    Args:
        session: The transaction.
        tenant: Whose trials there are; None for all.
    """

    def __init__(self, session: Session, tenant: str | None = None) -> None:
        self._session = session
        self._tenant = tenant

    def get(self, trial_id: str) -> TrialRow:
        """One trial.

        Raises:
            NotFound: If there is none with this id.
        """
        query = select(TrialRow).where(TrialRow.id == trial_id)
        if self._tenant is not None:
            query = query.join(JobRow, JobRow.id == TrialRow.job_id).where(JobRow.tenant == self._tenant)
        return found(self._session.scalar(query), "trial", trial_id)

    def shown(self, trial_id: str) -> ShownRow:
        """One trial as it is shown, with its job's spec.

        Raises:
            NotFound: If there is none with this id.
        """
        values = {"trial_id": trial_id, "tenant": self._tenant}
        query = _one_trial(owned=self._tenant is not None)
        return found(self._session.execute(query, values).first(), "trial", trial_id)

    def page(
        self,
        job_id: str,
        *,
        state: TrialState | None,
        family: str | None,
        descending: bool,
        after: int | None,
        limit: int,
    ) -> Sequence[ShownRow]:
        """Up to `limit` trials of a job that follow number `after`, by number."""
        query = _page_by_number(
            by_state=state is not None,
            by_family=family is not None,
            descending=descending,
            onward=after is not None,
        )
        values = {"job_id": job_id, "state": state, "family": family, "after": after, "limit": limit}
        return self._session.execute(query, values).all()

    def page_by_value(
        self,
        job_id: str,
        metric: str,
        *,
        state: TrialState | None,
        family: str | None,
        descending: bool,
        after: tuple[float, int] | None,
        limit: int,
    ) -> Sequence[ShownRow]:
        """Up to `limit` ended trials by their value of a metric, then number, that follow `after`.

        Each row has the value as `sorted_by`. The trials are met in the order of the index; those that do not
        match are passed over, so that a filter which few pass takes time with the job's trials.
        """
        query = _page_by_value(
            by_state=state is not None,
            by_family=family is not None,
            descending=descending,
            onward=after is not None,
        )
        value, number = after or (None, None)
        values = {"job_id": job_id, "metric": metric, "state": state, "family": family, "limit": limit}
        return self._session.execute(query, values | {"after": value, "after_number": number}).all()

    def best(
        self, job_id: str, metric: str, *, descending: bool, bounds: Sequence[ConstraintSpec]
    ) -> ShownRow | None:
        """The completed trial that is best in a metric within bounds; of equal ones the cheaper, the earlier.

        The trials are met in the order of the index, until one keeps the bounds.
        """
        query = _best(descending, tuple((bound.min is not None, bound.max is not None) for bound in bounds))
        values: dict[str, object] = {"job_id": job_id, "metric": metric}
        for index, bound in enumerate(bounds):
            values |= {
                f"bound_{index}": bound.metric,
                f"least_{index}": bound.min,
                f"most_{index}": bound.max,
            }
        return self._session.execute(query, values).first()

    def measurements(self, trial_id: str, *, after: int, limit: int) -> Sequence[ShownRow]:
        """Up to `limit` measurements of a trial beyond epoch `after`, by epoch."""
        values = {"trial_id": trial_id, "after": after, "limit": limit}
        return self._session.execute(_PAGE_OF_MEASUREMENTS, values).all()

    def completed_values(self, job_id: str) -> list[tuple[int, dict[str, float | None]]]:
        """Number and values of a job's completed trials, by number.

        The database joins them into one text: to fetch a thousand rows costs several times the query.
        """
        joined = self._session.scalar(_COMPLETED_VALUES, {"job_id": job_id})
        return sorted(((number, values) for number, values in parse(f"[{joined or ''}]")), key=itemgetter(0))

    def front(self, job_id: str) -> Sequence[ShownRow]:
        """The trials on a job's front, by number."""
        return self._session.execute(_FRONT, {"job_id": job_id}).all()

    def points(self, job_id: str, numbers: Sequence[int]) -> list[ShownRow]:
        """The trials of these numbers, by number, as points of a front."""
        rows: list[ShownRow] = []
        for start in range(0, len(numbers), NUMBERS_AT_A_TIME):
            some = numbers[start : start + NUMBERS_AT_A_TIME]
            rows += self._session.execute(_POINTS, {"job_id": job_id, "numbers": some})
        return rows

    def history(self, job_id: str, *, after: int, limit: int) -> Sequence[ShownRow]:
        """Up to `limit` states of a job's front beyond sequence `after`, each with its trial's number."""
        values = {"job_id": job_id, "after": after, "limit": limit}
        return self._session.execute(_PAGE_OF_HISTORY, values).all()


# The statements are made once: to put one together takes as long as to run it.
_OF_JOB = _TRIALS.c.job_id == bindparam("job_id")
_COMPLETED = _TRIALS.c.state == TrialState.COMPLETED
_NUMBER_AND_VALUES = "[" + cast(_TRIALS.c.number, Text) + "," + cast(_TRIALS.c["values"], Text) + "]"
_COMPLETED_VALUES = select(func.aggregate_strings(_NUMBER_AND_VALUES, ",")).where(_OF_JOB, _COMPLETED)
_FRONT = select(*shown.FRONT_POINT).where(_OF_JOB, ON_FRONT).order_by(_TRIALS.c.number)
_POINTS = (
    select(*shown.FRONT_POINT)
    .where(_OF_JOB, _TRIALS.c.number.in_(bindparam("numbers", expanding=True)))
    .order_by(_TRIALS.c.number)
)
_AFTER = bindparam("after", type_=BigInteger)  # a cursor's, which may be more than the column holds
_PAGE_OF_MEASUREMENTS = (
    select(*shown.MEASUREMENT)
    .where(_MEASUREMENTS.c.trial_id == bindparam("trial_id"), _MEASUREMENTS.c.epoch > _AFTER)
    .order_by(_MEASUREMENTS.c.epoch)
    .limit(bindparam("limit"))
)
_PAGE_OF_HISTORY = (
    select(*shown.FRONT_STEP)
    .select_from(_HISTORY)
    .join(_TRIALS, _TRIALS.c.id == _HISTORY.c.trial_id)
    .where(_HISTORY.c.job_id == bindparam("job_id"), _HISTORY.c.sequence > _AFTER)
    .order_by(_HISTORY.c.sequence)
    .limit(bindparam("limit"))
)
_VALUED = _VALUES.join(
    _TRIALS, (_TRIALS.c.job_id == _VALUES.c.job_id) & (_TRIALS.c.number == _VALUES.c.number)
)
_OF_METRIC = (_VALUES.c.job_id == bindparam("job_id")) & (_VALUES.c.metric == bindparam("metric"))


@cache
def _one_trial(*, owned: bool) -> Select[Any]:
    query = (
        select(*shown.TRIAL, cast(_JOBS.c.spec, Text).label("spec"))
        .join(_JOBS, _JOBS.c.id == _TRIALS.c.job_id)
        .where(_TRIALS.c.id == bindparam("trial_id"))
    )
    return query.where(_JOBS.c.tenant == bindparam("tenant")) if owned else query


@cache
def _page_by_number(*, by_state: bool, by_family: bool, descending: bool, onward: bool) -> Select[Any]:
    number, after = _TRIALS.c.number, bindparam("after", type_=BigInteger)
    query = select(*shown.TRIAL).where(_OF_JOB, *_matching(by_state, by_family)).limit(bindparam("limit"))
    if onward:
        query = query.where(number < after if descending else number > after)
    return query.order_by(number.desc() if descending else number)


@cache
def _page_by_value(*, by_state: bool, by_family: bool, descending: bool, onward: bool) -> Select[Any]:
    value, number = _VALUES.c.value, _VALUES.c.number
    query = select(*shown.TRIAL, value.label("sorted_by")).select_from(_VALUED).limit(bindparam("limit"))
    query = query.where(_OF_METRIC, *_matching(by_state, by_family))
    if onward:
        here, after = (
            tuple_(value, number),
            tuple_(bindparam("after", type_=Double), bindparam("after_number")),
        )
        query = query.where(here < after if descending else here > after)
    return query.order_by(*((value.desc(), number.desc()) if descending else (value, number)))


def _matching(by_state: bool, by_family: bool) -> Iterator[ColumnElement[bool]]:
    if by_state:
        yield _TRIALS.c.state == bindparam("state")
    if by_family:
        yield _TRIALS.c.family == bindparam("family")


@cache
def _best(descending: bool, bounded: tuple[tuple[bool, bool], ...]) -> Select[Any]:
    """For each bound, `bounded` says whether it has a least and a greatest value."""
    value = _VALUES.c.value
    fitting = [_OF_METRIC, _COMPLETED, *(_keeps(index, *ends) for index, ends in enumerate(bounded))]
    ranked = select(value).select_from(_VALUED).where(*fitting).limit(1)
    best = ranked.order_by(value.desc() if descending else value).scalar_subquery()
    macs = _VALUES.alias()
    return (
        select(*shown.TRIAL)
        .select_from(_VALUED)
        .outerjoin(macs, (macs.c.metric == "macs") & _same_trial(macs))
        .where(value == best, *fitting)
        .order_by(macs.c.value.nulls_last(), _VALUES.c.number)
        .limit(1)
    )


def _keeps(index: int, least: bool, greatest: bool) -> ColumnElement[bool]:
    """That the trial of a value keeps a bound, too."""
    other = _VALUES.alias()
    query = select(other.c.number).where(other.c.metric == bindparam(f"bound_{index}"), _same_trial(other))
    if least:
        query = query.where(other.c.value >= bindparam(f"least_{index}"))
    if greatest:
        query = query.where(other.c.value <= bindparam(f"most_{index}"))
    return query.exists()


def _same_trial(values: FromClause) -> ColumnElement[bool]:
    return (values.c.job_id == _VALUES.c.job_id) & (values.c.number == _VALUES.c.number)
