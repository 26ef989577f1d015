"""Documents as HTTP answers. Endpoints say by `response_model` what is in them."""

from collections.abc import Callable
from typing import ParamSpec

from starlette.responses import Response

from coterie.service.documents import Document, encode
from coterie.service.threads import Threads

# One computes while others wait for the database. With more, which compete for Python's one lock, an answer
# took twice the CPU time and the slowest took thrice as long (40 threads, 20 requests at a time).
READERS = Threads("readers", 3)
Parameters = ParamSpec("Parameters")


class Answer(Response):
    """A document, which is what it should be, and is not validated again."""

    media_type = "application/json"

    def render(self, content: Document | bytes) -> bytes:
        """The document's JSON, unless it is that already."""
        return content if isinstance(content, bytes) else encode(content)


async def answer(
    read: Callable[Parameters, Document], *args: Parameters.args, **kwargs: Parameters.kwargs
) -> Answer:
    """What a use-case reads, in one of the threads that are kept for that, so that writes hold up no read."""
    return Answer(await READERS.run(lambda: encode(read(*args, **kwargs))))
