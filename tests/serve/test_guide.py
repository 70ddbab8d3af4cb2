"""What the guide to serving says in tables is what there is. Its examples are run by `tests/test_docs.py`."""

import re
from dataclasses import fields
from pathlib import Path

from weft.serve.bench import Figures
from weft.serve.limits import Limits

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "serving.md").read_text()


def rows(first: str) -> list[list[str]]:
    """Cells of the table whose head begins with this."""
    table = re.search(rf"^\| ?{first}.*\n\|[-|]+\n((?:\|.*\n)+)", GUIDE, re.MULTILINE)[1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", cell)


def test_every_limit_stands_there_with_its_default():
    said = {names(name)[0]: default for name, default, _ in rows("limit ")}
    assert list(said) == list(Limits.model_fields) and len(said) == len(rows("limit "))
    for name, value in Limits():
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        assert said[name] == ("four for each slot" if value is None else shown)


def test_every_figure_of_the_bench_stands_there():
    assert [names(name)[0] for name, _ in rows("figure ")] == [field.name for field in fields(Figures)]


def test_every_address_stands_there(nano_server):
    said = {each for cell, _ in rows("address ") for each in names(cell)}
    found = set()
    for route in nano_server.app.routes:
        for method in getattr(route, "methods", None) or ():
            if method != "HEAD" and route.path.startswith(("/v1", "/health", "/ready", "/metrics", "/openapi")):
                found.add(f"{method} {route.path}")
    assert said == found


def test_every_metric_stands_there(nano_server):
    with nano_server.http() as http:
        http.post("/v1/images/generations", json={"model": "nano", "prompt": "a"})
        shown = http.get("/metrics").text
    said = {each for cell, _ in rows(r"metric ") for each in names(cell)}
    kinds = dict(re.findall(r"^# TYPE (\S+) (\w+)$", shown, re.MULTILINE))
    assert said == {name for name in kinds if not name.endswith("_created")}


def test_every_field_of_a_request_that_is_wefts_own_stands_there():
    from weft.serve.schema import ChatRequest, Extras

    own = {*Extras.model_fields, *({"response_image_format"} & ChatRequest.model_fields.keys())}
    assert own <= set(names(GUIDE)) | {each.partition(":")[0] for each in names(GUIDE)}


def test_the_statuses_are_those_that_are_declared(nano_server):
    said = {status for status, _ in rows("status ")}
    declared = {
        status
        for path in nano_server.app.openapi()["paths"].values()
        for method in path.values()
        for status in method["responses"]
    }
    assert said == declared - {"200", "422"}
