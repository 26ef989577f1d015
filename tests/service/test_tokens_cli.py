"""Tokens and tenants at a terminal, beside a server that runs; what client and commands do with a token."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from coterie.service import gate, serving
from coterie.service.cli import app
from coterie.service.client import ApiError, Client
from coterie.service.config import Settings
from coterie.service.ray_head import _head_environment
from coterie.service.serving import CannotServe
from tests.service.conftest import SPEC
from tests.service.live import LiveServer, live_server

TOKEN = re.compile(r"coterie_[0-9a-f]{16}_[0-9A-Za-z_-]{43}")


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveServer]:
    monkeypatch.setattr(gate, "CACHE_SECONDS", 0.0)
    with live_server(tmp_path / "data") as server:
        yield server


def coterie(*arguments: str, folder: Path) -> Result:
    """A command in this process, which has what it takes seconds to import."""
    return CliRunner().invoke(app, arguments, env={"COTERIE_DATA_DIR": str(folder), "NO_COLOR": "1"})


def at_terminal(*arguments: str, folder: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """A command in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("COTERIE_")}
    return subprocess.run(
        [sys.executable, "-m", "coterie.service.cli", *arguments],
        capture_output=True,
        text=True,
        env={**kept, "COTERIE_DATA_DIR": str(folder), "NO_COLOR": "1", **variables},
        cwd=folder.parent,
        timeout=60,
        check=False,
    )


def test_a_token_is_made_used_listed_and_revoked_while_the_server_runs(live: LiveServer) -> None:
    folder = live.settings.data_dir
    server = {"COTERIE_SERVER": live.url}
    assert live.client.get("/v1/jobs").status_code == 200

    made = at_terminal(
        "token", "create", "--role", "admin", "--tenant", "vision", "--name", "me", folder=folder
    )
    token = made.stdout.strip()
    assert made.returncode == 0
    assert TOKEN.fullmatch(token)
    assert token not in made.stderr

    refused = at_terminal("jobs", folder=folder, **server)
    assert refused.returncode == 2
    assert "Set COTERIE_TOKEN to an access token of this server" in refused.stderr

    known = {**server, "COTERIE_TOKEN": token}
    (folder.parent / "job.json").write_text(json.dumps(SPEC))
    submitted = at_terminal("submit", "job.json", folder=folder, **known)
    assert submitted.returncode == 0, submitted.stderr
    logged = at_terminal("audit", folder=folder, **known).stdout
    assert "job.submit" in logged
    assert submitted.stdout.strip() in logged

    [listed] = json.loads(coterie("token", "list", "--json", folder=folder).stdout)
    assert (listed["tenant"], listed["role"], listed["name"]) == ("vision", "admin", "me")
    row = coterie("token", "list", "--tenant", "vision", folder=folder).stdout.splitlines()[1].split()
    assert row == [listed["id"], "vision", "admin", "good", "never", "me"]
    assert coterie("token", "list", "--tenant", "other", "--json", folder=folder).stdout == "[]\n"

    assert coterie("token", "revoke", listed["id"], folder=folder).stdout == f"{listed['id']}: revoked\n"
    ended = at_terminal("jobs", folder=folder, **known)
    assert ended.returncode == 2
    assert "revoked" in ended.stderr
    assert token not in ended.stderr


def test_limits_of_a_tenant_are_set_and_shown(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    options = ("--max-queued-jobs", "5", "--max-device-seconds", "3600.5", "--max-stored-bytes", "1000000")
    shown = coterie("tenant", "set", "vision", *options, folder=folder)
    assert shown.stdout.splitlines()[1].split() == [
        *("vision", "0", "of", "5", "0", "0", "of", "3,600", "0", "of", "1,000,000")
    ]
    coterie("tenant", "set", "vision", "--max-queued-jobs", "none", folder=folder)
    [listed] = json.loads(coterie("tenant", "list", "--json", folder=folder).stdout)
    assert listed["limits"] == {
        "max_queued_jobs": None,
        "max_running_jobs": None,
        "max_device_seconds": 3600.5,
        "max_stored_bytes": 1_000_000,
    }
    assert json.loads(coterie("tenant", "show", "vision", "--json", folder=folder).stdout) == listed


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("token create", "--role"),
        ("token create --role king", "king"),
        ("token create --role reader --tenant a/b", "tenant: must be"),
        ("token create --role reader --expires soon", "expires: must be like 30d"),
        ("token revoke coterie_0000000000000000_secret", "no token of this id"),
        ("tenant set vision --max-queued-jobs -1", "--max-queued-jobs: "),
        ("tenant set vision --max-stored-bytes much", "--max-stored-bytes: "),
        ("tenant set vision --max-device-seconds nan", "--max-device-seconds: "),
        ("tenant set a/b --max-queued-jobs 1", "tenant: must be"),
    ],
)
def test_wrong_use_is_code_2_with_words(tmp_path: Path, command: str, words: str) -> None:
    done = coterie(*command.split(), folder=tmp_path / "data")
    assert (done.exit_code, done.stdout) == (2, "")
    assert words in done.stderr
    assert "secret" not in done.stderr
    assert "Traceback" not in done.stderr


def test_the_client_takes_a_token_or_the_environments(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    admin = live.client.post("/v1/tokens", json={"role": "admin"}).json()["token"]
    live.client.headers["Authorization"] = f"Bearer {admin}"
    made = live.client.post("/v1/tokens", json={"role": "reader"}).json()
    with Client(live.url, token=made["token"]) as client:
        assert client.tenant()["name"] == "default"
        assert made["token"] not in f"{client!r} {client._http.headers!r} {vars(client)}"
        with pytest.raises(ApiError, match="role submitter") as refused:
            client.submit(SPEC)
        assert refused.value.status == 403
    with Client(live.url) as client, pytest.raises(ApiError) as refused:
        client.tenant()
    assert refused.value.status == 401
    monkeypatch.setenv("COTERIE_TOKEN", made["token"])
    with Client(live.url) as client:
        assert client.tenant()["name"] == "default"


def test_the_client_waits_when_its_token_came_too_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "CACHE_SECONDS", 0.0)
    with live_server(tmp_path / "data", requests_per_second=1.0) as live:
        made = live.client.post("/v1/tokens", json={"role": "admin"}).json()
        live.client.headers["Authorization"] = f"Bearer {made['token']}"
        while live.client.get("/v1/tenant").status_code == 200:
            pass
        with Client(live.url, token=made["token"]) as client:
            assert client.tenant()["name"] == "default"


@pytest.mark.parametrize("token", ["coterie_1\nX-Evil: 1", "coterie_\N{PILE OF POO}", "coterie_a b", "\x00"])
def test_the_client_refuses_what_can_not_be_a_token_without_quoting_it(token: str) -> None:
    with pytest.raises(ValueError, match="COTERIE_TOKEN") as refused:
        Client(token=token)
    assert token not in str(refused.value)


def test_the_client_refuses_a_password_in_the_url_without_quoting_it() -> None:
    with pytest.raises(ValueError, match="must hold no password") as refused:
        Client("http://user:secret@127.0.0.1:8000")
    assert "secret" not in str(refused.value)


def test_a_token_in_the_servers_environment_reaches_neither_drivers_nor_their_orders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COTERIE_TOKEN", "coterie_secret")
    assert "coterie_secret" not in Settings(data_dir=tmp_path, _env_file=None).model_dump_json()
    assert "coterie_secret" not in str(_head_environment("marker", str(tmp_path), tmp_path / "token"))


def test_the_server_says_who_may_use_it(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "my data", _env_file=None)
    with socket.create_server(("127.0.0.1", 0)) as near, socket.create_server(("0.0.0.0", 0)) as far:
        told = " ".join(serving._access(settings, near))
        assert "open to all on this machine" in told
        assert f"coterie token create --role admin --data-dir '{settings.data_dir}'" in told
        with pytest.raises(CannotServe, match="nobody has an access token"):
            serving._access(settings, far)
        made = coterie("token", "create", "--role", "reader", "--expires", "1h", folder=settings.data_dir)
        assert made.exit_code == 0
        assert "with a token, from this machine" in " ".join(serving._access(settings, near))
        assert "with a token, from any machine" in " ".join(serving._access(settings, far))
        [listed] = json.loads(coterie("token", "list", "--json", folder=settings.data_dir).stdout)
        coterie("token", "revoke", listed["id"], folder=settings.data_dir)
        with pytest.raises(CannotServe, match="nobody has an access token"):
            serving._access(settings, far)
