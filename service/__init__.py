"""The service: REST API, storage, and the dispatcher that runs jobs on Ray."""

from importlib.metadata import version

VERSION = version("coterie")
