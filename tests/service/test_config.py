import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from coterie.service.config import Settings


def _settings(**values: object) -> Settings:
    return Settings(_env_file=None, **values)  # type: ignore[arg-type]


def test_everything_lives_in_the_data_folder_by_default(tmp_path: Path) -> None:
    settings = _settings(data_dir=tmp_path)
    assert settings.url == f"sqlite:///{tmp_path}/coterie.db"
    assert settings.artifacts_of("job_1") == tmp_path / "jobs" / "job_1"
    assert settings.log_of("job_1") == tmp_path / "jobs" / "job_1" / "worker.log"
    assert settings.node_cpus == os.cpu_count()


def test_the_environment_sets_what_the_caller_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COTERIE_PORT", "9000")
    monkeypatch.setenv("COTERIE_HOST", "0.0.0.0")
    monkeypatch.setenv("COTERIE_DATA_DIR", str(tmp_path))
    settings = _settings(host="127.0.0.1")
    assert (settings.port, settings.host, settings.data_dir) == (9000, "127.0.0.1", tmp_path)


def test_a_dotenv_file_may_hold_other_programs_variables(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("COTERIE_PORT=9001\nOTHER=1\n")
    assert Settings(data_dir=tmp_path, _env_file=tmp_path / ".env").port == 9001


def test_a_relative_data_folder_is_fixed_where_the_server_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _settings(data_dir="data").data_dir == tmp_path / "data"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"ray_address": "http://head:8265"}, "COTERIE_DATABASE_URL to PostgreSQL"),
        ({"database_url": "sqlite:///relative.db"}, "absolute path"),
        ({"database_url": "sqlite://"}, "absolute path"),
        ({"database_url": "no url"}, "must be like"),
        ({"port": 70000}, "less than or equal to 65535"),
        ({"max_running_jobs": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        _settings(**values)


def test_a_remote_ray_goes_with_postgresql() -> None:
    url = "postgresql+psycopg://db/coterie"
    settings = _settings(ray_address="http://head:8265", database_url=url)
    assert settings.url == url
