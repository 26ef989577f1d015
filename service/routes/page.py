"""GET /: the jobs, as a page for people."""

from functools import cache
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template, select_autoescape

from coterie.service import VERSION, jobs, page
from coterie.service.routes.parameters import ContextOf

SHOWN_JOBS = 50
router = APIRouter(include_in_schema=False)
_HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}


@router.get("/", response_class=HTMLResponse)
def show_page(context: ContextOf) -> HTMLResponse:
    """Show the newest jobs."""
    found = jobs.list_jobs(context, limit=SHOWN_JOBS)
    text = _template().render(
        jobs=found["items"],
        more=found["next_cursor"] is not None,
        dashboard_url=context.dispatcher.dashboard_url,
        version=VERSION,
    )
    return HTMLResponse(text, headers=_HEADERS)


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(page.__file__).parent / "templates"),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("jobs.html")
