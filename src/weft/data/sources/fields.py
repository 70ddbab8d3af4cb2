"""Reading the fields of a record of which nothing is known yet: each gives the value wanted, or says what is wrong."""

import math
from collections.abc import Sequence
from typing import Any, TypeVar, cast

from weft.data.stage import RecordError

T = TypeVar("T")
Object = dict[str, Any]

_NAMES: dict[type, str] = {str: "a string", list: "a list", dict: "an object", int: "a whole number", bool: "a bool"}
_NAMES[float] = "a number"


def of_type(value: Any, wanted: type[T], field: str) -> T:
    """The value itself; True is no number."""
    if type(value) is wanted:
        return value
    number = wanted in (int, float) and isinstance(value, (int, wanted)) and not isinstance(value, bool)
    if not (number or (wanted not in (int, float) and isinstance(value, wanted))):
        found = "null" if value is None else type(value).__name__
        raise RecordError("wrong_type", f"field {field} must be {_NAMES[wanted]}, got {found}", field=field)
    return cast(T, value)


def present(record: Object, key: str, at: str = "") -> Any:
    """`record[key]`, whatever it is."""
    if key not in record:
        raise RecordError("missing_key", f"field {at}{key} is missing", field=f"{at}{key}")
    return record[key]


def required(record: Object, key: str, wanted: type[T], at: str = "") -> T:
    """`record[key]`; `at` is where the record itself is, as in `steps[2].`."""
    return of_type(present(record, key, at), wanted, f"{at}{key}")


def optional(record: Object, key: str, wanted: type[T], at: str = "") -> T | None:
    """`record[key]`, or None where it is not there or null."""
    return None if record.get(key) is None else of_type(record[key], wanted, f"{at}{key}")


def name(record: Object, key: str, at: str = "") -> str:
    """A string with content, or a whole number as one: names and numbers of records and pictures."""
    value = record.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    found = required(record, key, str, at)
    if not found:
        raise RecordError("empty_value", f"field {at}{key} is empty", field=f"{at}{key}")
    return found


def objects(values: Sequence[Any], field: str) -> list[Object]:
    return [of_type(value, dict, f"{field}[{i}]") for i, value in enumerate(values)]


def first_of(record: Object, keys: Sequence[str]) -> str:
    """The first of `keys` that the record has and that is not null."""
    found = next((key for key in keys if record.get(key) is not None), None)
    if found is None:
        wanted = " or ".join(keys)
        raise RecordError("missing_key", f"field {wanted} is missing", field=keys[0])
    return found


def only(value: Any, what: str) -> tuple[str, Any]:
    """Key and value of an object with one member, which is how a member of a large object comes."""
    members = of_type(value, dict, what)
    if len(members) != 1:
        raise RecordError("wrong_type", f"a {what} must be one member of an object, got {len(members)}")
    return next(iter(members.items()))


def same_length(**lists: Sequence[Any]) -> None:
    if len({len(values) for values in lists.values()}) > 1:
        sizes = ", ".join(f"{key} {len(values)}" for key, values in lists.items())
        raise RecordError("count_mismatch", f"lists of different lengths: {sizes}", field=next(iter(lists)))


def plain(record: Any, *keys: str) -> Object:
    """Those of `keys` that hold a string, a bool or a finite number: what is worth keeping beside a document."""
    found = {key: record.get(key) for key in keys} if isinstance(record, dict) else {}
    return {key: value for key, value in found.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, bool, int)) or (isinstance(value, float) and math.isfinite(value))
