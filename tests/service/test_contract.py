"""The contract, by Schemathesis, at a size that fits; `contract.py` does thousands of cases by hand."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.service.contract import check
from tests.service.live import live_server


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "phases", "least"),
    [("sqlite", ("examples", "coverage"), 1500), ("postgres", ("fuzzing", "stateful"), 300)],
)
def test_the_server_keeps_its_contract(
    kind: str, phases: tuple[str, ...], least: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = None
    if kind == "postgres":
        make: Callable[[], str] = request.getfixturevalue("postgres")
        url = make()
    with live_server(tmp_path / "data", database_url=url, webhook_allow_private=True) as server:
        findings = check(server, tmp_path, examples=15, phases=phases)
    assert findings.passed, findings.text
    assert findings.cases >= least, findings.text
