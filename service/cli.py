"""The command line: `coterie ...`.

Whatever brings SQLAlchemy, torch or Ray is imported in the command that needs it, so that `coterie --help`
and `coterie jobs` answer at once.

Exit codes: 0 done; 1 the job did not succeed, or the server failed; 2 wrong use, or no server answers; 130
interrupted.
"""

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from coterie.service import console
from coterie.service.client import DEFAULT_URL, TOKEN_VARIABLE, ApiError, Client, Form, Job, Unreachable

if TYPE_CHECKING:
    from coterie.service.config import Settings
    from coterie.service.spec_file import SpecFile
    from coterie.service.storage.database import Database

JOB_FAILED = 1
WRONG_USE = 2
INTERRUPTED = 130
NO_TOKEN = (
    f"\nSet {TOKEN_VARIABLE} to an access token of this server; an admin has them, and on its machine "
    "`coterie token create` makes one."
)
SUFFIXES: dict[str, Form] = {".safetensors": "safetensors", ".onnx": "onnx", ".pt2": "pt2"}

app = typer.Typer(
    help="Search which tasks to learn together, and in which network.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
database = typer.Typer(help="The server's database.", no_args_is_help=True)
app.add_typer(database, name="db")
tokens = typer.Typer(help="Access tokens, made in the database itself.", no_args_is_help=True)
app.add_typer(tokens, name="token")
tenants = typer.Typer(help="Tenants, who share jobs, and what each may use.", no_args_is_help=True)
app.add_typer(tenants, name="tenant")
webhooks = typer.Typer(help="Who is told of events; it takes an admin's token.", no_args_is_help=True)
app.add_typer(webhooks, name="webhook")

Server = Annotated[str, typer.Option("--server", metavar="URL", envvar="COTERIE_SERVER", help="The server.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of a job.")]
WebhookId = Annotated[str, typer.Argument(metavar="WEBHOOK", help="Id of a webhook.")]
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", metavar="FOLDER", help="Data folder; default the user's own for Coterie."),
]
Tenant = Annotated[str, typer.Option("--tenant", metavar="NAME", help="Whose jobs it opens.")]
MaxJobs = Annotated[str | None, typer.Option(metavar="JOBS", help="At a time; none takes the limit back.")]
MaxMacs = Annotated[float | None, typer.Option(help="At most so many multiply-accumulates.")]
MaxParams = Annotated[float | None, typer.Option(help="At most so many parameters.")]
MaxLatency = Annotated[float | None, typer.Option(help="At most so many milliseconds an answer.")]


def main() -> None:
    """Run a command; whatever a user can get wrong ends as a message and a code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a name may hold what the terminal's encoding has not
    try:
        app(prog_name="coterie")
    except ApiError as error:
        hint = NO_TOKEN if error.status == HTTPStatus.UNAUTHORIZED else ""
        _fail(f"{error}{hint}", WRONG_USE if error.status < 500 else JOB_FAILED)
    except Unreachable as error:
        _fail(f"{error}\nStart a server with `coterie serve`, or name another one with --server URL.")


def _print_version(wanted: bool) -> None:
    if wanted:
        from coterie.service import VERSION

        typer.echo(f"coterie {VERSION}")
        raise typer.Exit


@app.callback()
def _coterie(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Search which tasks to learn together, and in which network."""


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; default 127.0.0.1.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port; default 8000, 0 any free one.")
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Run a server until Ctrl-C. Settings come from COTERIE_* variables too."""
    from coterie.service import serving

    try:
        serving.serve(_settings(host=host, port=port, data_dir=data_dir), console.make_console())
    except serving.CannotServe as error:
        _fail(str(error))


@app.command()
def demo(
    data_dir: Annotated[Path, typer.Option(metavar="FOLDER", help="Where to keep what it makes.")] = Path(
        ".demo"
    ),
) -> None:
    """Run a search from beginning to end: a server, a job, its front, a grouping put to the test."""
    from coterie.service import demo as demonstration
    from coterie.service.serving import CannotServe

    try:
        demonstration.run(console.make_console(), data_dir)
    except CannotServe as error:
        _fail(str(error))
    except demonstration.DemoFailed as error:
        _fail(str(error), JOB_FAILED)
    except KeyboardInterrupt:
        _fail("Interrupted: the job was cancelled and the server stopped.", INTERRUPTED)


@app.command()
def submit(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The job, as YAML or JSON.")],
    watch: Annotated[bool, typer.Option("--watch", help="Show progress until the job has ended.")] = False,
    as_json: AsJson = False,
    server: Server = DEFAULT_URL,
) -> None:
    """Submit a job and print its id; with --watch, follow it and print its front in the end."""
    from coterie.service.spec_file import BadSpecFile, read_spec_file

    try:
        spec = read_spec_file(file)
    except BadSpecFile as error:
        _fail(str(error))
    with _connect(server) as client:
        job = _submit(client, spec)
        if watch:
            typer.echo(f"Submitted {job.id}.", err=True)
            _watch(job, as_json)
        elif as_json:
            _print_json(job.document)
        else:
            typer.echo(job.id)
            typer.echo(f"{job.state}: see `coterie show {job.id}`", err=True)


@app.command()
def jobs(
    state: Annotated[str | None, typer.Option(help="Only jobs in this state.")] = None,
    name: Annotated[str | None, typer.Option(help="Only jobs of this name.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    as_json: AsJson = False,
    server: Server = DEFAULT_URL,
) -> None:
    """List jobs, newest first."""
    with _connect(server) as client:
        found = list(client.jobs(state=state, name=name, limit=limit))
    if as_json:
        _print_json([job.document for job in found])
    elif _any(found, "jobs"):
        console.show_jobs(console.make_console(), found, datetime.now(UTC))


@app.command()
def show(job: JobId, as_json: AsJson = False, server: Server = DEFAULT_URL) -> None:
    """Show a job: state, progress, what it searches, what it found about its tasks."""
    with _connect(server) as client:
        found = client.job(job)
    if as_json:
        _print_json(found.document)
    else:
        console.show_job(console.make_console(), found)


@app.command()
def logs(
    job: JobId,
    tail: Annotated[int | None, typer.Option(min=1, help="Only so many lines, the last ones.")] = None,
    server: Server = DEFAULT_URL,
) -> None:
    """Print what a job's driver wrote."""
    with _connect(server) as client:
        typer.echo(client.job(job).logs(tail), nl=False)


@app.command()
def events(
    job: JobId,
    after: Annotated[int, typer.Option(min=0, help="Only events of a higher number.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON document a line.")] = False,
    server: Server = DEFAULT_URL,
) -> None:
    """Print what happens to a job, a line an event, until it has ended."""
    with _connect(server) as client:
        try:
            for event in client.job(job).events(after):
                typer.echo(json.dumps(event, ensure_ascii=False) if as_json else console.event_line(event))
        except KeyboardInterrupt:
            raise SystemExit(INTERRUPTED) from None


@app.command()
def front(
    job: JobId,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    max_macs: MaxMacs = None,
    max_params: MaxParams = None,
    max_latency_ms: MaxLatency = None,
    server: Server = DEFAULT_URL,
) -> None:
    """Show a job's Pareto front: the trials that no other beats in everything, and what fresh seeds gave."""
    if as_json and as_csv:
        _fail("Give --json or --csv, not both.")
    with _connect(server) as client:
        found = client.job(job).front(max_macs=max_macs, max_params=max_params, max_latency_ms=max_latency_ms)
    if as_json:
        _print_json(found)
    elif as_csv:
        _print_csv(console.front_rows(found))
    elif found["points"]:
        console.show_front(console.make_console(), found)
    else:
        typer.echo("No trial is on the front.", err=True)


@app.command()
def affinity(job: JobId, as_json: AsJson = False, server: Server = DEFAULT_URL) -> None:
    """Show how much a job's tasks help each other."""
    with _connect(server) as client:
        found = client.job(job).affinity()
    if as_json:
        _print_json(found)
    elif found:
        console.show_affinities(console.make_console(), found)
    else:
        typer.echo("Nothing was measured of how the tasks help each other.", err=True)


@app.command()
def best(
    job: JobId,
    metric: Annotated[
        str | None, typer.Option(help="Best in what; default the job's first objective.")
    ] = None,
    max_macs: MaxMacs = None,
    max_params: MaxParams = None,
    max_latency_ms: MaxLatency = None,
    as_json: AsJson = False,
    server: Server = DEFAULT_URL,
) -> None:
    """Show the trial to deploy under the limits given."""
    with _connect(server) as client:
        trial = client.job(job).best(
            metric=metric, max_macs=max_macs, max_params=max_params, max_latency_ms=max_latency_ms
        )
    if as_json:
        _print_json(trial.document)
    else:
        console.show_trial(console.make_console(), trial)


@app.command()
def export(
    trial: Annotated[str, typer.Argument(metavar="TRIAL", help="Id of a trial.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FOLDER_OR_FILE",
            help="A folder, for architecture.json and weights.safetensors, or a file; default a folder, or "
            "with --format a file, named after the trial.",
        ),
    ] = None,
    form: Annotated[
        Form | None,
        typer.Option(
            "--format",
            help="Of the file: the weights alone (safetensors), or the whole network for ONNX or "
            "torch.export (pt2); default by the file's ending.",
        ),
    ] = None,
    server: Server = DEFAULT_URL,
) -> None:
    """Download a trial's network."""
    by_ending = SUFFIXES.get(output.suffix) if output else None
    if form and by_ending and form != by_ending:
        _fail(f"{output}: ends like {by_ending}, but --format asks for {form}")
    wanted = form or by_ending
    target = output or Path(f"{trial}.{form}" if form else trial)
    with _connect(server) as client:
        found = client.trial(trial)
        try:
            written = found.download_model(target, wanted) if wanted else found.download(target)
        except OSError as error:
            _fail(f"{target}: {error.strerror}")
    typer.echo(str(written))


@app.command()
def cancel(job: JobId, as_json: AsJson = False, server: Server = DEFAULT_URL) -> None:
    """Cancel a job; its trials end within seconds."""
    with _connect(server) as client:
        _show_state(client.job(job).cancel(), as_json)


@app.command()
def pause(job: JobId, as_json: AsJson = False, server: Server = DEFAULT_URL) -> None:
    """Pause a job: its devices are free within seconds, its trials keep their checkpoints."""
    with _connect(server) as client:
        _show_state(client.job(job).pause(), as_json)


@app.command()
def resume(job: JobId, as_json: AsJson = False, server: Server = DEFAULT_URL) -> None:
    """Resume a paused job: it is queued, and goes on where it was."""
    with _connect(server) as client:
        _show_state(client.job(job).resume(), as_json)


@app.command()
def delete(
    job: JobId,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    server: Server = DEFAULT_URL,
) -> None:
    """Delete a job that has ended, with its trials and their networks."""
    with _connect(server) as client:
        found = client.job(job)
        if not yes:
            if not sys.stdin.isatty():
                _fail(f"{job}: not deleted; --yes deletes without asking.")
            if not typer.confirm(f"Delete {job} ({found.document['name']}) and its networks?", err=True):
                _fail(f"{job}: not deleted.")
        found.delete()
    typer.echo(f"{job}: deleted")


@app.command(context_settings={"ignore_unknown_options": True})  # or -5 would be an option
def priority(
    job: JobId,
    number: Annotated[int, typer.Argument(metavar="N", help="Higher starts first; -1000 to 1000.")],
    as_json: AsJson = False,
    server: Server = DEFAULT_URL,
) -> None:
    """Let a job start sooner or later than others; one that runs goes on."""
    with _connect(server) as client:
        _show_state(client.job(job).set_priority(number), as_json)


@app.command()
def datasets(as_json: AsJson = False, server: Server = DEFAULT_URL) -> None:
    """List the data sets that jobs can name."""
    with _connect(server) as client:
        found = client.datasets()
    if as_json:
        _print_json(found)
    else:
        console.show_datasets(console.make_console(), found)


@database.command()
def upgrade(data_dir: DataDir = None) -> None:
    """Bring the database to this version's schema; no server may be running on the folder."""
    from coterie.service import serving

    settings = _settings(data_dir=data_dir)
    try:
        serving.upgrade_database(settings)
    except serving.CannotServe as error:
        _fail(str(error))
    typer.echo("The database is up to date.")


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Remove files and old jobs that nobody needs, whether or not a server runs.

    COTERIE_RETENTION_DAYS says how long jobs are kept, COTERIE_EVENT_RETENTION_DAYS how long the events of
    their trials; by default for ever.
    """
    from coterie.search.store import FilesUnavailable
    from coterie.service import files

    settings = _settings(data_dir=data_dir)
    found: list[files.Removed] = []
    fault = None
    with _opened(settings) as database:
        try:
            for removed in files.collect_garbage(settings, database, dry_run=dry_run):
                found.append(removed)
                if not as_json:
                    typer.echo(console.removed_line(removed))
        except (files.WrongDatabase, FilesUnavailable, OSError) as error:
            fault = str(error)
    if as_json:
        _print_json({"dry_run": dry_run, "removed": [asdict(removed) for removed in found]})
    else:
        done = [removed for removed in found if removed.problem is None]
        typer.echo(console.removed_total(done), err=True)
        if dry_run:
            typer.echo("This was a dry run: nothing was removed.", err=True)
    if fault is not None:
        _fail(fault)
    if any(removed.problem for removed in found):
        raise SystemExit(JOB_FAILED)


@app.command()
def audit(
    action: Annotated[str | None, typer.Option(help="Only changes of this kind, as job.cancel.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    as_json: AsJson = False,
    server: Server = DEFAULT_URL,
) -> None:
    """List what was changed in your tenant and by whom, newest first; it takes an admin's token."""
    with _connect(server) as client:
        found = list(client.changes(action=action, limit=limit))
    if as_json:
        _print_json(found)
    elif _any(found, "changes"):
        console.show_changes(console.make_console(), found)


@webhooks.command("create")
def create_webhook(
    url: Annotated[str, typer.Argument(metavar="URL", help="Where events are sent to.")],
    kinds: Annotated[
        list[str] | None,
        typer.Option("--kind", help="Of the events: job, trial or front; may be repeated; default all."),
    ] = None,
    as_json: AsJson = False,
    server: Server = DEFAULT_URL,
) -> None:
    """Have events of all jobs of the tenant sent to a URL; print the secret that signs them, this once."""
    with _connect(server) as client:
        made = client.create_webhook(url, kinds or ())
    if as_json:
        _print_json(made)
    else:
        typer.echo(made["secret"])
        typer.echo(f"{made['id']}: its secret is not shown again.", err=True)


@webhooks.command("list")
def list_webhooks(as_json: AsJson = False, server: Server = DEFAULT_URL) -> None:
    """List webhooks, oldest first."""
    with _connect(server) as client:
        found = client.webhooks()
    if as_json:
        _print_json(found)
    elif _any(found, "webhooks"):
        console.show_webhooks(console.make_console(), found)


@webhooks.command("delete")
def delete_webhook(webhook: WebhookId, server: Server = DEFAULT_URL) -> None:
    """Send a webhook nothing more, and forget what was sent."""
    with _connect(server) as client:
        client.delete_webhook(webhook)
    typer.echo(f"{webhook}: deleted")


@webhooks.command("deliveries")
def list_deliveries(
    webhook: WebhookId,
    state: Annotated[
        Literal["pending", "delivered", "dead"] | None, typer.Option(help="Only deliveries in this state.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    as_json: AsJson = False,
    server: Server = DEFAULT_URL,
) -> None:
    """List what was sent to a webhook or is on its way, newest first."""
    with _connect(server) as client:
        found = client.deliveries(webhook, state=state, limit=limit)
    if as_json:
        _print_json(found)
    elif _any(found, "deliveries"):
        console.show_deliveries(console.make_console(), found)


@webhooks.command("retry")
def retry_delivery(
    webhook: WebhookId,
    delivery: Annotated[str, typer.Argument(metavar="DELIVERY", help="Id of a delivery.")],
    server: Server = DEFAULT_URL,
) -> None:
    """Send a delivery again that is dead or waits."""
    with _connect(server) as client:
        client.retry_delivery(webhook, delivery)
    typer.echo(f"{delivery}: on its way")


@tokens.command("create")
def create_token(
    role: Annotated[
        Literal["reader", "submitter", "admin"],
        typer.Option(help="What it allows: to read; to run jobs too; to make tokens too."),
    ],
    tenant: Tenant = "default",
    expires: Annotated[
        str | None,
        typer.Option(metavar="WHEN", help="Until when, as 30d, 12h or 2027-01-01; default for ever."),
    ] = None,
    name: Annotated[str, typer.Option(help="What you call it, to tell it from others.")] = "",
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Make an access token and print it, this once. A server may be running meanwhile."""
    from coterie.service import access
    from coterie.service.auth import Role

    with _opened(_settings(data_dir=data_dir)) as database:
        try:
            made = access.create_token(
                database,
                access.operator(tenant),
                role=Role(role),
                name=name,
                expires_at=None if expires is None else access.parse_expiry(expires, datetime.now(UTC)),
            )
        except ValueError as error:
            _fail(str(error))
    if as_json:
        _print_json(made.model_dump(mode="json"))
    else:
        typer.echo(made.token)
        typer.echo(
            f"{made.id}: {role} of tenant {tenant}. It is not shown again: keep it, and set {TOKEN_VARIABLE} "
            "to it where it is used.",
            err=True,
        )


@tokens.command("list")
def list_tokens(
    tenant: Annotated[str | None, typer.Option(metavar="NAME", help="Only this tenant's.")] = None,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """List access tokens, newest first."""
    from coterie.service import access

    with _opened(_settings(data_dir=data_dir)) as database:
        found = [token.model_dump(mode="json") for token in access.all_tokens(database, tenant)]
    if as_json:
        _print_json(found)
    elif _any(found, "access tokens"):
        console.show_tokens(console.make_console(), found, datetime.now(UTC))


@tokens.command("revoke")
def revoke_token(
    token: Annotated[str, typer.Argument(metavar="ID", help="Id of a token, as token_...")],
    data_dir: DataDir = None,
) -> None:
    """Revoke an access token: within seconds it opens nothing."""
    from coterie.service import access
    from coterie.service.storage.repositories import NotFound

    with _opened(_settings(data_dir=data_dir)) as database:
        try:
            access.revoke_token(database, None, token)
        except NotFound:
            _fail("There is no token of this id: `coterie token list` shows them.")
    typer.echo(f"{token}: revoked")


@tenants.command("set")
def set_tenant(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The tenant.")],
    max_queued_jobs: MaxJobs = None,
    max_running_jobs: MaxJobs = None,
    max_device_seconds: Annotated[
        str | None, typer.Option(metavar="SECONDS", help="In a calendar month (UTC); none takes it back.")
    ] = None,
    max_stored_bytes: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="Weights and architectures of its trials; none takes it back."),
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Set what a tenant may use; limits that are not given stay as they are."""
    from pydantic import ValidationError

    from coterie.service import access

    given = {
        "max_queued_jobs": max_queued_jobs,
        "max_running_jobs": max_running_jobs,
        "max_device_seconds": max_device_seconds,
        "max_stored_bytes": max_stored_bytes,
    }
    limits = {limit: text for limit, text in given.items() if text is not None}
    settings = _settings(data_dir=data_dir)
    with _opened(settings) as database:
        try:
            access.set_limits(database, name, limits)
        except ValidationError as error:
            fault = error.errors()[0]
            _fail(f"--{str(fault['loc'][0]).replace('_', '-')}: {fault['msg']}; or none")
        except ValueError as error:
            _fail(str(error))
        found = access.show_tenant(database, name, settings.tenant_limits).model_dump()
    console.show_tenants(console.make_console(), [found])


@tenants.command("list")
def list_tenants(as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """List tenants: what each uses, of what it may."""
    from coterie.service import access

    settings = _settings(data_dir=data_dir)
    with _opened(settings) as database:
        found = [tenant.model_dump() for tenant in access.list_tenants(database, settings.tenant_limits)]
    if as_json:
        _print_json(found)
    elif _any(found, "tenants"):
        console.show_tenants(console.make_console(), found)


@tenants.command("show")
def show_tenant(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The tenant.")],
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Show what a tenant uses, of what it may."""
    from coterie.service import access

    settings = _settings(data_dir=data_dir)
    with _opened(settings) as database:
        if name not in access.tenant_names(database):
            typer.echo(f"Nobody has used the name {name} yet.", err=True)
        found = access.show_tenant(database, name, settings.tenant_limits).model_dump()
    if as_json:
        _print_json(found)
    else:
        console.show_tenants(console.make_console(), [found])


@contextmanager
def _opened(settings: "Settings") -> "Iterator[Database]":
    """The database itself, whether or not a server uses it too."""
    from coterie.service import serving

    try:
        with serving.opened_database(settings) as database:
            yield database
    except serving.CannotServe as error:
        _fail(str(error))


def _any(found: Sequence[object], what: str) -> bool:
    """Whether there is something to show; says so where there is not."""
    if not found:
        typer.echo(f"No {what}.", err=True)
    return bool(found)


def _connect(server: str) -> Client:
    try:
        return Client(server)
    except ValueError as error:
        _fail(str(error).replace("base_url", "--server"))


def _settings(**given: Any) -> "Settings":
    from pydantic import ValidationError

    from coterie.service.config import Settings

    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        faults = (
            f"{'.'.join(map(str, fault['loc'])) or 'settings'}: {fault['msg']}" for fault in error.errors()
        )
        _fail(
            "\n".join(["Bad settings (options or COTERIE_* variables):", *(f"  {fault}" for fault in faults)])
        )


def _submit(client: Client, spec: "SpecFile") -> Job:
    """Submit, and say of each fault on which line of the file it is."""
    try:
        return client.submit(spec.document)
    except ApiError as error:
        if not error.errors or error.status >= 500:
            raise
        faults = (f"{spec.locate(fault['pointer'])}: {fault['detail']}" for fault in error.errors)
        _fail("\n".join(["The job can't be run as specified", *(f"  {fault}" for fault in faults)]))


def _watch(job: Job, as_json: bool) -> None:
    try:
        console.watch(console.make_console(stderr=True), job)
    except KeyboardInterrupt:
        _fail(
            f"No longer watching: the job goes on. `coterie show {job.id}` shows it, "
            f"`coterie cancel {job.id}` ends it.",
            INTERRUPTED,
        )
    if as_json:
        _print_json(job.document)
    else:
        shown = console.make_console()
        if (found := job.front())["points"]:
            console.show_front(shown, found)
        console.show_verdict(shown, job)
    if job.state != "succeeded":
        _fail(f"{job.id}: {job.state}{f', {job.reason}' if job.reason else ''}", JOB_FAILED)


def _show_state(job: Job, as_json: bool) -> None:
    if as_json:
        _print_json(job.document)
    else:
        typer.echo(f"{job.id}: {job.state}")


def _print_json(document: object) -> None:
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))


def _print_csv(rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def _fail(message: str, code: int = WRONG_USE) -> NoReturn:
    typer.echo(message, err=True)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
