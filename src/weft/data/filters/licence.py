"""Under which conditions documents and pictures may be used."""

from typing import Literal

from weft.config import Config
from weft.data.annotate.material import noted, source_of
from weft.data.filters.removal import Costs, Problem, about, rejected, without
from weft.data.stage import Outcome, Stage
from weft.document import Document, Image

Access = Literal["open", "gated", "non_commercial"]
ACCESS: tuple[Access, ...] = ("open", "gated", "non_commercial")
"""The most permissive first."""
OF_SOURCES: dict[str, Access] = {"mmdialog": "non_commercial", "vist": "non_commercial", "youcook2": "non_commercial"}
"""Where a document does not say."""


class Licence(Config):
    """Drops what may not be used, and notes the access class of the rest in `meta.access`."""

    kind: Literal["licence"] = "licence"
    access: Access = "non_commercial"
    """The most restrictive class that is kept."""
    pictures: tuple[str, ...] | None = None
    """Licences of pictures that are kept, as their source writes them; None: all. A picture without one is kept."""
    on_other_licence: Costs = "image"


def access_of(document: Document) -> Access:
    known = document.meta.get("access")
    return known if known in ACCESS else OF_SOURCES.get(source_of(document), "open")


def build(config: Licence) -> Stage:
    def stage(document: Document) -> Outcome:
        access = access_of(document)
        if ACCESS.index(access) > ACCESS.index(config.access):
            return rejected("access", f"access is {access}, more restrictive than {config.access}")
        marked = noted(document, access=access)
        return without(marked, lambda image, _: _problem(document, image, config), config.on_other_licence)

    return stage


def _problem(document: Document, image: Image, config: Licence) -> Problem | None:
    known = about(document, image)
    licence = known.get("licence", known.get("license"))
    if config.pictures is None or licence is None or str(licence) in config.pictures:
        return None
    return Problem("licence", f"licence {licence}, none of {', '.join(config.pictures)}")
