"""TFRecord files of SequenceExamples, without TensorFlow: the framing, its checksums, and the messages inside.

A record on disk, little-endian:   u64 length | u32 masked CRC32C of the length | payload | u32 masked CRC32C of it

A payload that fails its checksum costs that record. A length that fails ends the file, for nothing says where the next
record is.
"""

import functools
import gzip
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from weft.data.stage import RecordError
from weft.errors import UsageError

MAX_PAYLOAD, _MAX_SKIPPED = 16 * 2**20, 2**30
"""Bytes of a record that is read, and of one that is worth passing over."""

Values = list[bytes] | list[int] | list[float]
Example = tuple[dict[str, Values], dict[str, list[Values]]]
"""The context by name, and the feature lists by name: one list of values to a step."""


def payloads(file: Path) -> Iterator[bytes | RecordError]:
    """Every record's bytes, plain or in gzip, or why they cannot be had."""
    try:
        with open(file, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(file, "rb") if packed else open(file, "rb") as handle:
            yield from _payloads(handle)  # type: ignore[arg-type]  # a GzipFile reads like any other
    except (OSError, EOFError, zlib.error) as error:
        yield RecordError("damaged_file", f"file is damaged, the rest is lost: {error}")


def _payloads(handle: IO[bytes]) -> Iterator[bytes | RecordError]:
    while header := handle.read(12):
        if len(header) < 12:
            yield RecordError("truncated", "the file ends inside a record")
            return
        size, check = struct.unpack("<QI", header)
        if masked_crc(header[:8]) != check:
            yield RecordError("bad_checksum", "a record's length fails its checksum; the rest of the file is lost")
            return
        if size > _MAX_SKIPPED:
            yield RecordError("too_large", f"record has {size:,} bytes; the rest of the file is lost")
            return
        if size > MAX_PAYLOAD:
            _skip(handle, size + 4)
            yield RecordError("too_large", f"record has {size:,} bytes, more than {MAX_PAYLOAD:,}")
            continue
        payload, footer = handle.read(size), handle.read(4)
        if len(payload) < size or len(footer) < 4:
            yield RecordError("truncated", "the file ends inside a record")
            return
        if masked_crc(payload) != struct.unpack("<I", footer)[0]:
            yield RecordError("bad_checksum", "record fails its checksum")
        else:
            yield payload


def masked_crc(data: bytes) -> int:
    """CRC32C, turned and shifted so that the checksum of data that holds checksums stays a good one."""
    try:
        import google_crc32c
    except ImportError as error:
        raise UsageError("reading TFRecord files needs google-crc32c", fix="pip install 'weft[tfrecord]'") from error
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def frame(payload: bytes) -> bytes:
    """The payload as it lies in a file."""
    size = struct.pack("<Q", len(payload))
    return size + struct.pack("<I", masked_crc(size)) + payload + struct.pack("<I", masked_crc(payload))


def parse_example(payload: bytes) -> Example:
    """Context and feature lists of a SequenceExample.

    Raises:
        RecordError: the bytes are no such message.
    """
    from google.protobuf.message import DecodeError

    message = example_class()()
    try:
        message.ParseFromString(payload)
    except DecodeError as error:
        raise RecordError("bad_message", f"not a SequenceExample: {error}") from error
    context = {name: _values(feature) for name, feature in message.context.feature.items()}
    lists = {
        name: [_values(feature) for feature in found.feature]
        for name, found in message.feature_lists.feature_list.items()
    }
    return context, lists


def example_class() -> Any:
    """The message SequenceExample, from its published field numbers."""
    try:
        return _messages()
    except ImportError as error:
        raise UsageError("reading TFRecord files needs protobuf", fix="pip install 'weft[tfrecord]'") from error


@functools.cache
def _messages() -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="weft_example.proto", package="weft_example", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, Any, str | None], repeated: bool = False) -> Any:
        made = file.message_type.add(name=name)
        for key, number, kind, of in fields:
            label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            made.field.add(name=key, number=number, type=kind, label=label, type_name=of and f".weft_example.{of}")
        return made

    message("BytesList", ("value", 1, field.TYPE_BYTES, None), repeated=True)
    message("FloatList", ("value", 1, field.TYPE_FLOAT, None), repeated=True)
    message("Int64List", ("value", 1, field.TYPE_INT64, None), repeated=True)
    kinds = (("bytes_list", "BytesList"), ("float_list", "FloatList"), ("int64_list", "Int64List"))
    feature = message("Feature", *((key, i, field.TYPE_MESSAGE, of) for i, (key, of) in enumerate(kinds, start=1)))
    feature.oneof_decl.add(name="kind")
    for each in feature.field:
        each.oneof_index = 0
    message("FeatureList", ("feature", 1, field.TYPE_MESSAGE, "Feature"), repeated=True)
    for name, key, of in (("Features", "feature", "Feature"), ("FeatureLists", "feature_list", "FeatureList")):
        # a map is a list of entries, whose message has to be named after the field
        entry_name = f"{key.title().replace('_', '')}Entry"
        holder = message(name, (key, 1, field.TYPE_MESSAGE, f"{name}.{entry_name}"), repeated=True)
        entry = holder.nested_type.add(name=entry_name)
        entry.options.map_entry = True
        entry.field.add(name="key", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
        entry.field.add(
            name="value", number=2, type=field.TYPE_MESSAGE, label=field.LABEL_OPTIONAL, type_name=f".weft_example.{of}"
        )
    message(
        "SequenceExample",
        ("context", 1, field.TYPE_MESSAGE, "Features"),
        ("feature_lists", 2, field.TYPE_MESSAGE, "FeatureLists"),
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("weft_example.SequenceExample"))


def _values(feature: Any) -> Values:
    kind = feature.WhichOneof("kind")
    return list(getattr(feature, kind).value) if kind else []


def _skip(handle: IO[bytes], size: int) -> None:
    while size > 0 and (read := len(handle.read(min(size, 2**20)))):
        size -= read
