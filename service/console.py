"""What the command line shows: tables, one thing in full, and progress.

On a terminal there are bars and rules, within 80 columns; in a pipe plain lines. Ids are never cut, since
other commands take them.
"""

import math
import string
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from coterie.service.client import Document, Job, Trial

if TYPE_CHECKING:
    from coterie.service.files import Removed

LOOK_SECONDS = 1.0  # between two looks at a job
LINE_SECONDS = 3.0  # between two lines about it where there is no terminal
UNLIMITED = 100_000  # columns
LEAST_CUT = 8  # what a cut column keeps
LEAST_NAME = 12  # what a cut task name keeps
CELL = 8  # columns of a number of an affinity, as "-123.4", and of the gap behind it
UNKNOWN = "-"
GAIN = "delta_m"  # what a confirmed point is judged by
TASK_PREFIX = "task."  # of a metric that is one task's own

WAITS = {  # for more than its turn
    "running_limit": "its tenant runs as many jobs as it may",
    "device_seconds": "its tenant has used its device-seconds of this month",
}
STYLES = {
    "succeeded": "green",
    "completed": "green",
    "running": "cyan",
    "failed": "red",
    "cancelled": "yellow",
    "paused": "yellow",
}


def make_console(*, stderr: bool = False) -> Console:
    """A console that prints text as it is, and in a pipe as wide as need be."""
    console = Console(stderr=stderr, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = UNLIMITED
    return console


def show_jobs(console: Console, jobs: Iterable[Job], now: datetime) -> None:
    """A line a job."""
    table = _table(("job", "state", "trials", "age", "name"), right=("trials", "age"))
    for job in jobs:
        trials = job.progress["budget"]["trials"]
        table.add_row(
            job.id,
            _state(job.state, job.document["queue"]),
            str(trials["used"]) if trials["total"] is None else f"{trials['used']}/{trials['total']}",
            _age(now, job),
            Text(job.document["name"]),
        )
    _show(console, table, cut_last=True)


def show_tokens(console: Console, tokens: Iterable[Document], now: datetime) -> None:
    """A line a token."""
    table = _table(("token", "tenant", "role", "state", "expires", "name"))
    for token in tokens:
        expires = token["expires_at"]
        if token["revoked_at"] is not None:
            state = "revoked"
        else:
            state = "expired" if expires and datetime.fromisoformat(expires) <= now else "good"
        until = "never" if expires is None else _time(expires)
        row = (token["id"], token["tenant"], token["role"], state, until, token["name"])
        table.add_row(*map(Text, row))
    _show(console, table, cut_last=True)


def show_tenants(console: Console, tenants: Iterable[Document]) -> None:
    """A line a tenant: what it uses, of what it may."""
    kinds = ("queued_jobs", "running_jobs", "device_seconds", "stored_bytes")
    titles = ("queued", "running", "device-seconds this month", "bytes stored")
    table = _table(("tenant", *titles), right=titles)
    for tenant in tenants:
        limits = ((kind, tenant["limits"][f"max_{kind}"]) for kind in kinds)
        uses = (
            _amount(tenant["usage"][kind]) + ("" if limit is None else f" of {_amount(limit)}")
            for kind, limit in limits
        )
        table.add_row(*map(Text, (tenant["name"], *uses)))
    _show(console, table)


def show_changes(console: Console, changes: Iterable[Document]) -> None:
    """A line a change."""
    table = _table(("at", "by", "action", "target", "detail"))
    for change in changes:
        detail = ", ".join(f"{name} {value}" for name, value in change["detail"].items())
        by = change["token_id"] or UNKNOWN
        row = (_time(change["at"]), by, change["action"], change["target"], detail)
        table.add_row(*map(Text, row))
    _show(console, table, cut_last=True)


def show_webhooks(console: Console, webhooks: Iterable[Document]) -> None:
    """A line a webhook."""
    table = _table(("webhook", "state", "kinds", "url"))
    for webhook in webhooks:
        state = "disabled" if webhook["disabled_at"] else "told"
        table.add_row(webhook["id"], state, ", ".join(webhook["kinds"]), Text(webhook["url"]))
    _show(console, table)


def show_deliveries(console: Console, deliveries: Iterable[Document]) -> None:
    """A line a delivery."""
    table = _table(("delivery", "state", "attempts", "error"), right=("attempts",))
    for delivery in deliveries:
        cells = (delivery["id"], delivery["state"], str(delivery["attempts"]), delivery["last_error"] or "")
        table.add_row(*map(Text, cells))
    _show(console, table, cut_last=True)


def event_line(event: Document) -> str:
    """An event in one line."""
    pairs = (
        f"{name} {_figures(value) if isinstance(value, dict) else _parameter(value)}"
        for name, value in event["data"].items()
        if value is not None and value != {}
    )
    line = f"{event['sequence']:>6}  {_time(event['at'])}  {event['kind']:<11}  {', '.join(pairs)}"
    return "".join(character if character.isprintable() else " " for character in line)


def _time(at: str) -> str:
    """A time as JSON has it, in UTC, to the second."""
    return at[:19]


def removed_line(removed: "Removed") -> str:
    """Something that `coterie gc` removed, in one line."""
    amount = f"{removed.events:,} events" if removed.events else _megabytes(removed.size)
    problem = f": not removed, {removed.problem}" if removed.problem else ""
    return f"{amount:>14}  {removed.kind}  {removed.name}{problem}"


def removed_total(items: Sequence["Removed"]) -> str:
    """What all of it came to."""
    events = sum(item.events for item in items)
    told = f"{len(items):,} things, {_megabytes(sum(item.size for item in items))}"
    return f"{told}, {events:,} events" if events else told


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def show_datasets(console: Console, items: Sequence[Document]) -> None:
    """Each data set with its tasks and options."""
    for item in items:
        tasks = ", ".join(f"{task['name']} ({task['kind']})" for task in item["tasks"])
        options = (
            f"{name} (default {about.get('default', UNKNOWN)}): {about.get('description', '')}"
            for name, about in item["schema"].get("properties", {}).items()
        )
        pairs = {"": item["description"], "tasks": tasks, "options": "\n".join(options)}
        _show_pairs(console, f"{item['name']}  {item['title']}", pairs)


def show_job(console: Console, job: Job) -> None:
    """All that a user wants to know of one job."""
    document, spec = job.document, job.document["spec"]
    search, eta = spec["search"], job.progress["eta_seconds"]
    objectives = (objective["metric"] for objective in spec["objectives"])
    pairs = {
        "state": _with_reason(document),
        "queue": _place(document["queue"]),
        "trials": _trial_counts(job.progress["trials"]),
        "budget": _budget(job.progress["budget"]),
        "time left": "" if eta is None else _duration(eta),
        "hypervolume": figure("hypervolume", document["hypervolume"]),
        "verdict": _verdict(job),
        "data": spec["dataset"]["source"],
        "tasks": ", ".join(_names(spec["tasks"])) or "all",
        "families": ", ".join(search["families"]),
        "objectives": ", ".join(objectives),
        "created": document["created_at"],
        "started": document["started_at"] or "",
        "ended": document["ended_at"] or "",
        "in Ray": document["links"]["ray_dashboard"] or "",
    }
    _show_pairs(console, f"{job.id}  {document['name']}", pairs)


def show_trial(console: Console, trial: Trial) -> None:
    """One trial: what it is and what it reached."""
    document = trial.document
    parameters = {name: value for name, value in document["candidate"].items() if name != "grouping"}
    overall = {name: value for name, value in trial.values.items() if not name.startswith(TASK_PREFIX)}
    test = {name: trial.test.get(name) for name in overall if trial.test.get(name) != overall[name]}
    pairs = {
        "state": _with_reason(document),
        "family": f"{trial.family} on {document['backbone']}",
        "grouping": "\n".join(", ".join(group) for group in trial.grouping or []),
        "candidate": ", ".join(f"{name} {_parameter(value)}" for name, value in parameters.items()),
        "proposed by": document["origin"],
        "seed": str(document["seed"]),
        "validation": _figures(overall),
        "test": _figures(test),
        "tasks": "\n".join(
            f"{name.removeprefix(TASK_PREFIX)} {figure(name, value)}, test {figure(name, trial.test[name])}"
            for name, value in trial.values.items()
            if name.startswith(TASK_PREFIX)
        ),
    }
    _show_pairs(console, trial.id, pairs)


def show_front(console: Console, front: Document) -> None:
    """A line a point, the first objective's best first, with its tasks as letters."""
    points = _sorted_points(front)
    letters = _letters(point["grouping"] for point in points)
    metrics = front_metrics(front)
    error = "test\nerror" if console.is_terminal else "test error"  # every column counts within 80
    table = _table(("trial", "family", "grouping", *metrics, error), right=(*metrics, error))
    for point in points:
        table.add_row(
            point["trial_id"],
            point["family"],
            _spell(point["grouping"], letters),
            *(figure(metric, point["values"].get(metric)) for metric in metrics),
            figure("test error", mean_error(point["test"])),
        )
    _show(console, table)
    if letters:
        legend = ", ".join(f"{letter} {name}" for name, letter in letters.items())
        console.print(f"Tasks: {escape(legend)}", soft_wrap=False)
    _show_confirmed(console, [point for point in points if point["confirmed"]])


def show_verdict(console: Console, job: Job) -> None:
    """What a job has found about its tasks, where it has."""
    if words := _verdict(job):
        console.print(f"\n{escape(words)}", soft_wrap=False)


def show_affinities(console: Console, items: Iterable[Document]) -> None:
    """A table a method: a row a task that helps, a column a task that is helped.

    Where the console has not room for all columns, there are several tables.
    """
    for index, item in enumerate(items):
        tasks = item["tasks"]
        letters = _letters([[tasks]])
        longest = max(map(len, tasks))
        label = max(LEAST_NAME, min(longest, console.width - CELL * len(tasks) - CELL))
        exponent = _exponent(value for row in item["matrix"] for value in row)
        unit = f" In units of 1e{exponent}." if exponent else ""
        spread = " Below each number its standard error over the seeds." if item["seeds"] > 1 else ""
        seeds = f"{item['seeds']} seed{'s' * (item['seeds'] > 1)}"
        trained = f"{item['backbone']}, {item['epochs']} epochs, {seeds}, {item['split']} split"
        words = f"{item['description']}{unit}{spread}"
        heading = Text.assemble("\n" * (index > 0), (item["method"], "bold"), f"  {trained}\n{words}")
        console.print(heading, soft_wrap=False)
        room = max(1, (console.width - label) // CELL - 1)
        for first in range(0, len(tasks), room):
            columns = range(first, min(first + room, len(tasks)))
            heads = [letters[tasks[j]] for j in columns]
            table = _table(("", *heads), right=heads)
            for i, name in enumerate(tasks):
                numbers = (_cell(item, i, j, exponent) for j in columns)
                table.add_row(Text(f"{letters[name]} {_shorten(name, label)}"), *numbers)
            _show(console, table)


def front_rows(front: Document) -> list[dict[str, Any]]:
    """The front for a spreadsheet: a row a point, groups as `a b|c`, every value in full."""
    return [
        {
            "trial": point["trial_id"],
            "family": point["family"],
            "grouping": "|".join(" ".join(group) for group in point["grouping"] or []),
            **point["values"],
            **{f"test_{name}": value for name, value in point["test"].items()},
            **_confirmed_columns(point["confirmed"]),
        }
        for point in _sorted_points(front)
    ]


def front_metrics(front: Document) -> list[str]:
    """The columns of a front: its objectives, and what a network costs."""
    objectives = [objective["metric"] for objective in front["objectives"]]
    return list(dict.fromkeys([*objectives, "macs", "params"]))


def mean_error(values: Mapping[str, float | None]) -> float | None:
    """Mean error rate of the tasks, in percent; None where they have none."""
    total = values.get("total_error")
    tasks = sum(1 for name in values if name.startswith(TASK_PREFIX) and name.endswith(".error"))
    return None if total is None or not tasks else total / tasks


def figure(name: str, value: float | None) -> str:
    """A metric's value, as every table and sentence shows it."""
    if value is None:
        return UNKNOWN
    if name in ("macs", "params"):
        return f"{value:,.0f}"
    if name in ("delta_m", "delta_m_own_width", "normalized_gain"):
        return f"{value:+.2f}"
    if name in ("test error", "total_error"):
        return f"{value:.2f}%"
    return f"{value:.4g}"


def watch(console: Console, job: Job) -> Job:
    """Show a job's progress until it has ended."""
    with _progress_display(console, job) as show:
        return job.wait(LOOK_SECONDS, show)


def _verdict(job: Job) -> str:
    verdict = job.document["verdict"]
    return str(verdict["words"]) if verdict else ""


def _show_confirmed(console: Console, points: Sequence[Document]) -> None:
    """A line for each point that was trained again, with its gain over a shared network of equal macs."""
    if not points:
        return
    seeds = sorted({point["confirmed"]["seeds"] for point in points})
    times = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    names = ("trial", GAIN, f"test {GAIN}", "over shared")
    table = _table(names, right=names[1:])
    for point in points:
        found = point["confirmed"]
        table.add_row(
            point["trial_id"],
            _spread(found["validation"].get(GAIN)),
            _spread(found["test"].get(GAIN)),
            _comparison(found["over_shared"]),
        )
    console.print(
        f"\nTrained again with {times} fresh seeds: mean ± standard deviation, and the gain in delta_m over "
        "a shared network of about the same macs with its confidence interval; noise where that holds 0.",
        soft_wrap=False,
    )
    _show(console, table)


def _spread(spread: Document | None) -> str:
    if spread is None:
        return UNKNOWN
    return f"{spread['mean']:+.1f}" + (f" ± {spread['std']:.1f}" if spread["std"] is not None else "")


def _comparison(over_shared: Document | None) -> str:
    if over_shared is None:
        return UNKNOWN
    gain = "noise" if over_shared["within_noise"] else f"{over_shared['gain']:+.1f}"
    return f"{gain} ({over_shared['low']:+.1f} to {over_shared['high']:+.1f})"


def _confirmed_columns(confirmed: Document | None) -> dict[str, Any]:
    if confirmed is None:
        return {}
    return {
        "confirmed_seeds": confirmed["seeds"],
        **{
            f"confirmed_{prefix}{name}_{part}": spread[part]
            for prefix, split in (("", "validation"), ("test_", "test"))
            for name, spread in confirmed[split].items()
            for part in ("mean", "std")
        },
        **{f"over_shared_{name}": value for name, value in (confirmed["over_shared"] or {}).items()},
    }


def _exponent(values: Iterable[float | None]) -> int:
    """The power of ten in whose units the greatest of these has two digits; 0 where it is 1 or more."""
    greatest = max((abs(value) for value in values if value is not None), default=0.0)
    return math.floor(math.log10(greatest)) - 1 if 0 < greatest < 1 else 0


def _cell(item: Document, i: int, j: int, exponent: int) -> str:
    value, error = item["matrix"][i][j], item["standard_error"][i][j]
    if i == j:
        return ""
    if value is None:
        return UNKNOWN
    return f"{value / 10**exponent:+.1f}" + ("" if error is None else f"\n±{error / 10**exponent:.1f}")


def _shorten(name: str, width: int) -> str:
    """A name without its middle: names that differ at one end stay apart."""
    if len(name) <= width:
        return name
    tail = (width - 1) // 2
    return f"{name[: width - 1 - tail]}…{name[len(name) - tail :]}"


@contextmanager
def _progress_display(console: Console, job: Job) -> "Iterator[_Lines | _Bar]":
    best = _Best()
    if not console.is_terminal:
        yield _Lines(console, best)
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[status]}"),
        console=console,
        auto_refresh=False,  # it is drawn after each look, without a thread for it
        transient=True,
        expand=True,
    )
    with bar:
        yield _Bar(bar, best)
    console.print(escape(f"{job.document['name']}: {job.state}, {_status(job, best)}"))


class _Best:
    """The first objective's best value on the front, asked for again only after a trial has ended."""

    def __init__(self) -> None:
        self._done = 0
        self._words = ""

    def words(self, job: Job) -> str:
        done = job.progress["trials"]["completed"]
        if done != self._done:
            self._done = done
            self._words = self._ask(job.front())
        return self._words

    @staticmethod
    def _ask(front: Document) -> str:
        metric = front["objectives"][0]["metric"]
        points = _sorted_points(front)
        return f"best {metric} {figure(metric, points[0]['values'][metric])}" if points else ""


class _Bar:
    """A bar that fills with the part of the budget that is used."""

    def __init__(self, progress: Progress, best: _Best) -> None:
        self._progress = progress
        self._best = best
        self._task = progress.add_task("", total=1.0, status="")

    def __call__(self, job: Job) -> None:
        status = escape(_status(job, self._best))
        self._progress.update(self._task, description=job.state, completed=_share(job), status=status)
        self._progress.refresh()


class _Lines:
    """A line whenever something changed, not more often than every few seconds."""

    def __init__(self, console: Console, best: _Best) -> None:
        self._console = console
        self._best = best
        self._shown: tuple[str, int] | None = None
        self._next = 0.0

    def __call__(self, job: Job) -> None:
        now = time.monotonic()
        seen = (job.state, _ended_trials(job))
        moved = self._shown is None or seen[0] != self._shown[0]
        if moved or (seen != self._shown and now >= self._next):
            self._shown, self._next = seen, now + LINE_SECONDS
            self._console.print(escape(f"{job.document['name']}: {job.state}, {_status(job, self._best)}"))


def _status(job: Job, best: _Best) -> str:
    trials = job.progress["budget"]["trials"]
    total = "" if trials["total"] is None else f" of {trials['total']}"
    failed = job.progress["trials"]["failed"]
    left = job.progress["eta_seconds"]
    # The first trial comes after the data and the single-task networks that gains are measured against.
    begins = job.state == "running" and not any(job.progress["trials"].values())
    parts = [
        f"{trials['used']}{total} trials",
        "preparing" if begins else "",
        f"{failed} failed" if failed else "",
        best.words(job),
        f"{_duration(left)} left" if left is not None else "",
    ]
    return ", ".join(part for part in parts if part)


def _share(job: Job) -> float:
    """The part of the budget that is used up first."""
    budget = (job.progress["budget"][kind] for kind in ("trials", "seconds", "device_seconds"))
    return min(1.0, max((each["used"] / each["total"] for each in budget if each["total"]), default=0.0))


def _ended_trials(job: Job) -> int:
    trials = job.progress["trials"]
    return int(trials["completed"] + trials["stopped"] + trials["failed"])


def _sorted_points(front: Document) -> list[Document]:
    """Points by the first objective, the best first."""
    objective = front["objectives"][0]
    return sorted(
        front["points"],
        key=lambda point: point["values"][objective["metric"]],
        reverse=objective["direction"] == "maximize",
    )


def _letters(groupings: Iterable[Sequence[Sequence[str]] | None]) -> dict[str, str]:
    """A short name for each task: letters, or numbers where they don't suffice.

    The grouping of the fewest groups comes first: a single group has the tasks in the job's order.
    """
    known = sorted((grouping for grouping in groupings if grouping), key=len)
    names = list(dict.fromkeys(name for grouping in known for group in grouping for name in group))
    letters = string.ascii_uppercase
    return {name: letters[i] if len(names) <= len(letters) else str(i + 1) for i, name in enumerate(names)}


def _spell(grouping: Sequence[Sequence[str]] | None, letters: Mapping[str, str]) -> str:
    if not grouping:
        return UNKNOWN
    within = "" if len(letters) <= len(string.ascii_uppercase) else ","
    return "|".join(within.join(letters[name] for name in group) for group in grouping)


def _table(names: Sequence[str], right: Sequence[str] = ()) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=True)
    return table


def _show(console: Console, table: Table, *, cut_last: bool = False) -> None:
    """Print a table in full; with `cut_last`, its last column is cut to what the terminal has room for."""
    if cut_last and _natural_width(console, table) > console.width:
        last = table.columns[-1]
        last.max_width = LEAST_CUT
        last.max_width = max(LEAST_CUT, console.width - _natural_width(console, table) + LEAST_CUT)
    room = console.width
    console.width = max(room, _natural_width(console, table))  # else Rich would cut ids
    console.print(table)
    console.width = room


def _natural_width(console: Console, table: Table) -> int:
    return Measurement.get(console, console.options.update(max_width=UNLIMITED), table).maximum


def _show_pairs(console: Console, title: str, pairs: Mapping[str, str]) -> None:
    """A title, and below it names with their values; a long value goes on below its beginning."""
    console.print(Text(title, style="bold"))
    indent = 4 + max(map(len, pairs))
    for name, value in pairs.items():
        lines = [
            part
            for line in value.splitlines()
            for part in textwrap.wrap(
                line, console.width - indent, break_on_hyphens=False, break_long_words=False
            )
        ]
        for index, line in enumerate(lines):
            label = f"  {'' if index else name}".ljust(indent)
            console.print(Text.assemble((label, "dim"), line))


def _state(state: str, place: Document | None = None) -> Text:
    return Text(f"{state} ({place['position']})" if place else state, style=STYLES.get(state, ""))


def _place(place: Document | None) -> str:
    if place is None:
        return ""
    expected = place["expected_start_at"]
    waits = WAITS.get(place["waits_for"]) or (f"expected to start at {expected}" if expected else "")
    return f"place {place['position']}{waits and ': '}{waits}"


def _with_reason(document: Document) -> str:
    state, reason = document["state"], document["reason"]
    return f"{state}: {reason}" if reason else state


def _trial_counts(trials: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in trials.items() if count) or "none yet"


def _budget(budget: Mapping[str, Mapping[str, float | None]]) -> str:
    return ", ".join(
        f"{name} {_amount(use['used'])} of {_amount(use['total'])}"
        for name, use in budget.items()
        if use["total"] is not None
    )


def _amount(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.0f}"


def _figures(values: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {figure(name, value)}" for name, value in values.items() if value is not None)


def _parameter(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _names(tasks: Iterable[str | Mapping[str, Any]]) -> list[str]:
    return [task if isinstance(task, str) else task["name"] for task in tasks]


def _age(now: datetime, job: Job) -> str:
    created = datetime.fromisoformat(job.document["created_at"])
    return _duration(max(0.0, (now - created).total_seconds()))


def _duration(seconds: float) -> str:
    """A time in the two units that matter."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"
