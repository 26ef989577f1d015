"""The Python client of a Coterie server.

    with Client("http://127.0.0.1:8000") as client:
        job = client.submit({"dataset": {"source": "digits"}, "budget": {"trials": 20}})
        network = job.wait().best(metric="delta_m").load()

Neither torch nor Ray is imported unless a network is loaded, so that scripts and the command line start fast.
"""

import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self
from urllib.parse import quote

import httpx

if TYPE_CHECKING:  # pydantic and torch take seconds to import, and only the types are needed here
    from torch import nn

    from coterie.search.spec import JobSpec

Document = dict[str, Any]

DEFAULT_URL = "http://127.0.0.1:8000"
TOKEN_VARIABLE = "COTERIE_TOKEN"
CONNECTION_RETRIES = 2  # of connecting only: a request that was sent is never sent again
RATE_RETRIES = 5  # of a request that was refused since its token came too often
LONGEST_WAIT_SECONDS = 60.0  # before such a retry; told to wait longer, the caller is told too
PAGE_SIZE = 200
SILENCE_SECONDS = 45.0  # an event stream that is silent for so long is broken: there is a heartbeat every 15
# Before an event stream that broke is taken up again; doubled each time.
FIRST_PAUSE_SECONDS = 0.2
LAST_PAUSE_SECONDS = 10.0
PASSING = frozenset({429, 502, 503, 504})  # statuses of servers that start, stop or have too much to do
ENDED = frozenset({"succeeded", "failed", "cancelled"})  # states in which a job stays
ARCHITECTURE_FILE = "architecture.json"
WEIGHTS_FILE = "weights.safetensors"

Form = Literal["safetensors", "onnx", "pt2"]
CONVERSION_SECONDS = 600.0  # to wait for a form that the server has yet to make


class ApiError(Exception):
    """The server refused a request, in the words of its problem document (RFC 9457).

    Attributes:
        status: The HTTP status.
        title: What kind of problem it is.
        detail: What is wrong with this request.
        errors: For a bad body or query, each fault as {"pointer": ..., "detail": ...}.
    """

    def __init__(self, status: int, title: str, detail: str, errors: list[Document] | None = None) -> None:
        self.status = status
        self.title = title
        self.detail = detail
        self.errors = errors or []
        faults = (f"  {error.get('pointer') or '/'}: {error.get('detail')}" for error in self.errors)
        super().__init__("\n".join([title, *faults] if self.errors else [f"{title}: {detail}"]))


class Unreachable(Exception):
    """No Coterie server answered."""


class Client:
    """A connection to one server; a context manager, and safe to share between threads.

    Args:
        base_url: Where the server is.
        timeout: Seconds to wait for a connection, and for each piece of an answer.
        token: An access token; by default the environment's `COTERIE_TOKEN`, if that is set.

    Raises:
        ValueError: If `base_url` is not an http or https URL, or `token` can't be a token.

    Every method that asks the server raises `ApiError` where it refuses and `Unreachable` where none answers.
    """

    def __init__(
        self, base_url: str = DEFAULT_URL, timeout: float = 30.0, *, token: str | None = None
    ) -> None:
        url = _parse(base_url)
        self.base_url = str(url).rstrip("/")
        self.timeout = timeout
        self._http = httpx.Client(
            base_url=self.base_url,
            timeout=timeout,
            headers=_authorization(os.environ.get(TOKEN_VARIABLE) if token is None else token),
            # Given a transport, httpx asks no proxy of the environment: none knows this machine's ports.
            transport=_Patient(retries=CONNECTION_RETRIES),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def submit(self, spec: "Mapping[str, Any] | JobSpec", idempotency_key: str | None = None) -> "Job":
        """Submit a job.

        Args:
            spec: What to search; a mapping is sent as it is, and the server checks it.
            idempotency_key: With the same key and spec, a second call gives the first one's job.
        """
        body = spec if isinstance(spec, Mapping) else spec.model_dump(mode="json", exclude_unset=True)
        headers = {"Content-Type": "application/json"}
        if idempotency_key is not None:
            headers["Idempotency-Key"] = idempotency_key
        return Job(self, self._json("POST", "/v1/jobs", content=json.dumps(body), headers=headers))

    def jobs(
        self, *, state: str | None = None, name: str | None = None, limit: int | None = None
    ) -> "Iterator[Job]":
        """Jobs, newest first, read page by page.

        Args:
            state: Only jobs in this state.
            name: Only jobs of this name.
            limit: At most so many; default all.
        """
        return (Job(self, item) for item in self._items("/v1/jobs", limit, state=state, name=name))

    def job(self, job_id: str) -> "Job":
        """The job with this id."""
        return Job(self, self._json("GET", _path("jobs", job_id)))

    def trial(self, trial_id: str) -> "Trial":
        """The trial with this id."""
        return Trial(self, self._json("GET", _path("trials", trial_id)))

    def create_webhook(self, url: str, kinds: Sequence[str] = ()) -> Document:
        """Have events sent to a URL, of these kinds (job, trial, front; default all), signed with a secret.

        Returns:
            The webhook, with its `secret`, which is not shown again.
        """
        body = {"url": url, "kinds": list(kinds)} if kinds else {"url": url}
        return self._json("POST", "/v1/webhooks", json=body)

    def webhooks(self) -> list[Document]:
        """The tenant's webhooks, oldest first."""
        return list(self._pages("/v1/webhooks", {}))

    def delete_webhook(self, webhook_id: str) -> None:
        """Send a webhook nothing more."""
        with self._answer("DELETE", _path("webhooks", webhook_id)):
            pass

    def deliveries(
        self, webhook_id: str, *, state: str | None = None, limit: int | None = None
    ) -> list[Document]:
        """What was sent to a webhook or is on its way, newest first.

        Args:
            webhook_id: Id of the webhook.
            state: Only pending, delivered or dead ones.
            limit: At most so many; default all.
        """
        return list(self._items(_path("webhooks", webhook_id, "deliveries"), limit, state=state))

    def retry_delivery(self, webhook_id: str, delivery_id: str) -> Document:
        """Send a delivery again that is dead or waits."""
        return self._json("POST", _path("webhooks", webhook_id, "deliveries", delivery_id, "retry"))

    def datasets(self) -> list[Document]:
        """The data sets that jobs can name, with their tasks and the JSON Schema of their options."""
        return list(self._pages("/v1/datasets", {}))

    def families(self) -> list[Document]:
        """The families of networks, with the JSON Schema of their dimensions."""
        return list(self._pages("/v1/families", {}))

    def backbones(self) -> list[Document]:
        """The backbones, with the JSON Schema of their dimensions."""
        return list(self._pages("/v1/backbones", {}))

    def metrics(self) -> list[Document]:
        """The metrics, with direction and unit."""
        return list(self._pages("/v1/metrics", {}))

    def tenant(self) -> Document:
        """The caller's tenant: `limits`, and `usage` now and in this month."""
        return self._json("GET", "/v1/tenant")

    def changes(self, *, action: str | None = None, limit: int | None = None) -> Iterator[Document]:
        """What was changed in the caller's tenant, and by whom, newest first; for admins.

        Args:
            action: Only changes of this kind, as `job.cancel`.
            limit: At most so many; default all.
        """
        return self._items("/v1/audit", limit, action=action)

    def health(self) -> Document:
        """That the server lives."""
        return self._json("GET", "/healthz")

    def ready(self) -> Document:
        """That the server can run jobs; `ApiError` with status 503 while it can't."""
        return self._json("GET", "/readyz")

    def _items(self, path: str, limit: int | None = None, **query: Any) -> Iterator[Document]:
        """The items of all pages, or the first `limit` of them."""
        return islice(self._pages(path, {**query, "limit": min(limit or PAGE_SIZE, PAGE_SIZE)}), limit)

    def _pages(self, path: str, query: Document) -> Iterator[Document]:
        cursor: str | None = None
        while True:
            page = self._json("GET", path, params=query | {"cursor": cursor})
            yield from page["items"]
            cursor = page["next_cursor"]
            if cursor is None:
                return

    def _events(self, path: str, after: int) -> Iterator[Document]:
        seen = after
        met = False  # whether a server has answered: until then its absence is an error, as everywhere
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                with self._answer(
                    "GET",
                    path,
                    headers={"Last-Event-ID": str(seen)},
                    timeout=max(self.timeout, SILENCE_SECONDS),
                ) as response:
                    if response.status_code == httpx.codes.NO_CONTENT:
                        return
                    met = True
                    for event in _server_sent(response.iter_lines()):
                        seen, pause = event["sequence"], FIRST_PAUSE_SECONDS
                        yield event
            except (ApiError, Unreachable) as error:
                passes = isinstance(error, Unreachable) or error.status in PASSING
                if not (met and passes):
                    raise
            time.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, LAST_PAUSE_SECONDS)

    def _json(self, method: str, path: str, *, params: Document | None = None, **request: Any) -> Document:
        with self._answer(method, path, params=params, **request) as response:
            response.read()
            try:
                document = response.json()
            except ValueError:
                document = None
        if not isinstance(document, dict):
            raise Unreachable(
                f"What answers at {self.base_url} is no Coterie server: {method} {path} gave no JSON"
            )
        return document

    def _text(self, path: str, params: Document) -> str:
        with self._answer("GET", path, params=params) as response:
            response.read()
            return response.text

    @contextmanager
    def _answer(
        self, method: str, path: str, *, params: Document | None = None, **request: Any
    ) -> Iterator[httpx.Response]:
        """A successful answer whose body is still to be read; parameters that are None are left out."""
        given = {name: value for name, value in (params or {}).items() if value is not None}
        try:
            with self._http.stream(method, path, params=given, **request) as response:
                if not response.is_success:
                    response.read()
                    raise _problem(response)
                yield response
        except httpx.TimeoutException as error:
            raise Unreachable(
                f"The server at {self.base_url} did not answer in time ({method} {path})"
            ) from error
        except httpx.RequestError as error:
            raise Unreachable(f"No server answers at {self.base_url}: {error}") from error


class Job:
    """A job on the server: its document as last read, and what can be asked about it.

    Attributes:
        document: The job as JSON.
    """

    def __init__(self, client: Client, document: Document) -> None:
        self._client = client
        self.document = document

    def __repr__(self) -> str:
        return f"Job({self.id!r}, state={self.state!r})"

    @property
    def id(self) -> str:
        """Its id."""
        return str(self.document["id"])

    @property
    def state(self) -> str:
        """Its state when last read."""
        return str(self.document["state"])

    @property
    def ended(self) -> bool:
        """Whether it has succeeded, failed or been cancelled."""
        return self.state in ENDED

    @property
    def reason(self) -> str | None:
        """Why it is in its state, where there is something to say."""
        reason: str | None = self.document["reason"]
        return reason

    @property
    def progress(self) -> Document:
        """Trials by state, budget used and in total, seconds left."""
        progress: Document = self.document["progress"]
        return progress

    def refresh(self) -> Self:
        """Read the job again."""
        self.document = self._client._json("GET", _path("jobs", self.id))
        return self

    def wait(
        self,
        interval: float = 1.0,
        callback: "Callable[[Job], object] | None" = None,
        timeout: float | None = None,
    ) -> Self:
        """Wait until the job has ended, in whichever state; one that is paused has not.

        Args:
            interval: Seconds between two looks.
            callback: Called with the job after each look, the last one included.
            timeout: Seconds to wait at most; default without end.

        Raises:
            TimeoutError: If the job has not ended by then. It goes on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            self.refresh()
            if callback is not None:
                callback(self)
            if self.ended:
                return self
            if deadline is not None and time.monotonic() + interval > deadline:
                raise TimeoutError(f"{self.id} is still {self.state} after {timeout:g} s")
            time.sleep(interval)

    def trials(
        self,
        *,
        state: str | None = None,
        family: str | None = None,
        sort: str | None = None,
        limit: int | None = None,
    ) -> "Iterator[Trial]":
        """Its trials, read page by page.

        Args:
            state: Only trials in this state.
            family: Only trials of this family.
            sort: What to order them by, as the API takes it.
            limit: At most so many; default all.
        """
        path = _path("jobs", self.id, "trials")
        items = self._client._items(path, limit, state=state, family=family, sort=sort)
        return (Trial(self._client, item) for item in items)

    def front(
        self,
        *,
        objectives: Sequence[str] = (),
        max_macs: float | None = None,
        max_params: float | None = None,
        max_latency_ms: float | None = None,
        feasible: bool = True,
    ) -> Document:
        """The Pareto front: `objectives`, `reference_point`, `hypervolume` and `points`.

        Args:
            objectives: Metrics to trade, instead of the job's own objectives.
            max_macs: Only points of at most so many multiply-accumulates.
            max_params: Only points of at most so many parameters.
            max_latency_ms: Only points that answer within so many milliseconds.
            feasible: Only points that keep the job's constraints.
        """
        query = {
            "objectives": ",".join(objectives) or None,
            "max_macs": max_macs,
            "max_params": max_params,
            "max_latency_ms": max_latency_ms,
            "feasible": str(feasible).lower(),
        }
        return self._client._json("GET", _path("jobs", self.id, "front"), params=query)

    def history(self) -> list[Document]:
        """The front's hypervolume after each trial that completed."""
        return list(self._client._items(_path("jobs", self.id, "front", "history")))

    def best(
        self,
        *,
        metric: str | None = None,
        max_macs: float | None = None,
        max_params: float | None = None,
        max_latency_ms: float | None = None,
    ) -> "Trial":
        """The trial to deploy under these limits; `ApiError` 404 names the nearest miss where none fits.

        Args:
            metric: What it should be best in; default the job's first objective.
            max_macs: At most so many multiply-accumulates.
            max_params: At most so many parameters.
            max_latency_ms: At most so many milliseconds an answer.
        """
        query = {
            "metric": metric,
            "max_macs": max_macs,
            "max_params": max_params,
            "max_latency_ms": max_latency_ms,
        }
        return Trial(self._client, self._client._json("GET", _path("jobs", self.id, "best"), params=query))

    def affinity(self) -> list[Document]:
        """How much its tasks help each other: `matrix` and more, an item for each method that measured it."""
        return list(self._client._pages(_path("jobs", self.id, "affinity"), {}))

    def references(self) -> list[Document]:
        """The reference networks that it measures against, read page by page."""
        return list(self._client._items(_path("jobs", self.id, "references")))

    def cancel(self) -> Self:
        """Ask for its end; its trials stop within seconds."""
        return self._change("cancel")

    def pause(self) -> Self:
        """Take it off its devices, within seconds; `resume` lets it go on where it was."""
        return self._change("pause")

    def resume(self) -> Self:
        """Queue it again after a pause."""
        return self._change("resume")

    def delete(self) -> None:
        """Delete it, with its trials and their networks; it must have ended."""
        with self._client._answer("DELETE", _path("jobs", self.id)):
            pass

    def set_priority(self, priority: int) -> Self:
        """Let it start sooner (higher) or later than other jobs; one that runs goes on."""
        self.document = self._client._json("PATCH", _path("jobs", self.id), json={"priority": priority})
        return self

    def events(self, after: int = 0) -> Iterator[Document]:
        """What happens to it, as it happens, until it has ended; none is left out or comes twice.

        When the connection breaks or the server restarts, it goes on where it was, however long that takes.
        Of a job that ended long ago the operator may have removed the events of trials and epochs.

        Args:
            after: Only events of a higher `sequence`.

        Yields:
            `{job_id, sequence, kind, at, data}`; `kind` is job, trial, measurement or front.
        """
        return self._client._events(_path("jobs", self.id, "events"), after)

    def logs(self, tail: int | None = None) -> str:
        """What the job's driver wrote; the last `tail` lines of it."""
        return self._client._text(_path("jobs", self.id, "logs"), {"tail": tail})

    def _change(self, action: str) -> Self:
        self.document = self._client._json("POST", _path("jobs", self.id, action))
        return self


class Trial:
    """A trial on the server: its document as read, and its network.

    Attributes:
        document: The trial as JSON.
    """

    def __init__(self, client: Client, document: Document) -> None:
        self._client = client
        self.document = document

    def __repr__(self) -> str:
        return f"Trial({self.id!r}, family={self.family!r}, state={self.document['state']!r})"

    @property
    def id(self) -> str:
        """Its id."""
        return str(self.document["id"])

    @property
    def family(self) -> str:
        """The family of its candidate."""
        return str(self.document["family"])

    @property
    def grouping(self) -> list[list[str]] | None:
        """Which tasks share a branch; None where its family has none, or it has not ended."""
        grouping: list[list[str]] | None = self.document["grouping"]
        return grouping

    @property
    def values(self) -> dict[str, float | None]:
        """Metric -> value on the validation split; of a stopped trial, what it had reached."""
        values: dict[str, float | None] = self.document["values"]
        return values

    @property
    def test(self) -> dict[str, float | None]:
        """Metric -> value on the test split, on which nothing was chosen."""
        test: dict[str, float | None] = self.document["test"]
        return test

    def architecture(self) -> Document:
        """Its static network, as JSON."""
        return self._client._json("GET", _path("trials", self.id, "architecture"))

    def download(self, folder: str | Path) -> Path:
        """Write `architecture.json` and `weights.safetensors` into `folder`, which is made if need be.

        Each file is complete or absent; what stood there under its name is replaced.

        Returns:
            The folder, for `coterie.models.export.load_architecture`.
        """
        folder = Path(folder)
        self.download_model(folder / WEIGHTS_FILE)
        with _replacing(folder / ARCHITECTURE_FILE) as file:
            file.write_text(json.dumps(self.architecture(), indent=2) + "\n", encoding="utf-8")
        return folder

    def download_model(self, path: str | Path, form: Form = "safetensors") -> Path:
        """Write the network to the file `path`.

        Args:
            path: Where to; what stood there is replaced.
            form: `safetensors` is the weights alone; `onnx` and `pt2` (`torch.export.load` reads it) are the
                whole network on raw inputs.
        """
        with (
            self._client._answer(
                "GET",
                _path("trials", self.id, "model"),
                params={"format": form},
                timeout=max(self._client.timeout, CONVERSION_SECONDS),
            ) as response,
            _replacing(Path(path)) as file,
            file.open("wb") as stream,
        ):
            for block in response.iter_bytes():
                stream.write(block)
        return Path(path)

    def load(self) -> "nn.Module":
        """Its network, in eval mode: raw inputs [B, *input_shape] -> {task: its outputs}."""
        from coterie.models.export import load_architecture  # here, as importing torch takes seconds

        with tempfile.TemporaryDirectory(prefix="coterie-") as folder:
            return load_architecture(self.download(folder))


def _server_sent(lines: Iterable[str]) -> Iterator[Document]:
    """The data of Server-Sent Events, whole ones only; comments and the like are left out."""
    data: list[str] = []
    for line in lines:
        if line.startswith("data:"):
            data.append(line[len("data:") :])
        elif not line and data:
            yield json.loads("\n".join(data))
            data = []


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A new file that takes the place of `path` once it is written, and vanishes if that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _path(*parts: str) -> str:
    """A path of the API: `parts` may be a user's words."""
    return "/v1/" + "/".join(quote(part, safe="") for part in parts)


def _parse(base_url: str) -> httpx.URL:
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise ValueError(f"base_url: must be like {DEFAULT_URL}, found {base_url!r}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"base_url: must be like {DEFAULT_URL}, found {base_url!r}")
    if url.userinfo:  # errors name the URL
        raise ValueError(f"base_url: must hold no password; {TOKEN_VARIABLE} takes an access token")
    return url


class _Patient(httpx.HTTPTransport):
    """Comes back when the server says, where a token came too often: what was refused has not happened."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = super().handle_request(request)
        for _ in range(RATE_RETRIES):
            wait = response.headers.get("Retry-After", "")
            if response.status_code != httpx.codes.TOO_MANY_REQUESTS or not wait.isdecimal():
                break
            if int(wait) > LONGEST_WAIT_SECONDS:
                break
            response.close()
            time.sleep(int(wait))
            response = super().handle_request(request)
        return response


def _authorization(token: str | None) -> dict[str, str]:
    if not token:
        return {}
    # What HTTP can't send, its libraries would quote in their errors.
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise ValueError(f"token ({TOKEN_VARIABLE}): must be as `coterie token create` printed it")
    return {"Authorization": f"Bearer {token}"}


def _problem(response: httpx.Response) -> ApiError:
    try:
        document = response.json()
    except ValueError:
        document = None
    if not isinstance(document, dict) or "title" not in document:
        words = f"{response.request.method} {response.request.url} is answered by no Coterie server"
        return ApiError(response.status_code, f"HTTP {response.status_code}", words)
    return ApiError(
        response.status_code, document["title"], document.get("detail") or "", document.get("errors")
    )
