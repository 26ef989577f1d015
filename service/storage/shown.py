"""What the API shows of rows: only the columns that it needs, and JSON as the text that it is stored as.

To parse JSON and write it again would cost a page of trials more than all else together. `document.py` passes
the text on.
"""

from typing import Any

from sqlalchemy import JSON, ColumnElement, Row, Text, cast
from sqlalchemy.sql.elements import KeyedColumnElement

from coterie.service.storage.tables import FrontHistoryRow, JobRow, MeasurementRow, Table, TrialRow

ShownRow = Row[Any]


def _shown(table: type[Table], names: str) -> tuple[ColumnElement[Any], ...]:
    columns = table.__table__.columns
    return tuple(_as_text(columns[name]) for name in names.split())


def _as_text(column: KeyedColumnElement[Any]) -> ColumnElement[Any]:
    return cast(column, Text).label(column.name) if isinstance(column.type, JSON) else column


JOB = _shown(
    JobRow,
    "position id name tenant state reason spec priority submission_id hypervolume verdict eta_seconds eta_at "
    "trials_pending trials_running trials_completed trials_stopped trials_failed seconds device_seconds "
    "created_at started_at ended_at",
)
# What is needed of a job to show what belongs to it.
JOB_FRAME = _shown(JobRow, "id spec directions hypervolume reference_point")
TRIAL = _shown(
    TrialRow,
    "id job_id number state reason family backbone parameters origin seed grouping values tasks test epochs "
    "device_seconds worker on_front started_at ended_at",
)
FRONT_POINT = _shown(TrialRow, "id number family grouping values test")
FRONT_STEP = (
    *_shown(FrontHistoryRow, "sequence trial_id"),
    *_shown(TrialRow, "number"),
    *_shown(FrontHistoryRow, "hypervolume size at"),
)
MEASUREMENT = _shown(MeasurementRow, "epoch values tasks device_seconds at")


def named(row: ShownRow) -> dict[str, Any]:
    """A row's columns by name: faster to take apart than the row, by a half."""
    return dict(zip(row._fields, row, strict=True))
