"""A reader of ONNX files that needs neither onnx nor protobuf and trusts nothing that it reads.

Field numbers and names are those of onnx.proto (ONNX 1.23, IR version 14); the encoding is
https://protobuf.dev/programming-guides/encoding. protobuf itself is lenient: it skips fields that
it does not know and merges a message that comes twice. A file read one way here and another way by
the runtime would make every check worthless, so all of that is refused. Messages nest to a fixed
depth (graphs inside attributes are seen, not read), weights are never copied, and the number of
fields is limited: the cost of reading does not depend on what a file claims.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from ddpm_edge.errors import BundleError

MAX_FIELDS = 400_000  # some 36 a node; as many empty ones take 3 s and 140 MB
MAX_TEXT = 4096  # bytes of a name or of a text attribute
MAX_PROPERTY = 1 << 20  # bytes of a property of the model, such as a schedule of many betas
MAX_RANK = 8  # TensorRT's limit; networks use at most 5
DTYPES = {  # TensorProto.DataType -> name, bytes of an element
    1: ("float32", 4), 2: ("uint8", 1), 3: ("int8", 1), 4: ("uint16", 2), 5: ("int16", 2),
    6: ("int32", 4), 7: ("int64", 8), 9: ("bool", 1), 10: ("float16", 2), 11: ("float64", 8),
    12: ("uint32", 4), 13: ("uint64", 8), 16: ("bfloat16", 2),
}  # fmt: skip
SIZES = dict(DTYPES.values())

Span = tuple[int, int]  # bytes start..end of the file


@dataclass(frozen=True)
class Tensor:
    """An initializer, or a tensor in an attribute: its header and where its data lie.

    Attributes:
        spans: of the data as raw little-endian bytes.
        numbers: the data, where the file holds them as numbers.
        external: whether the data are in another file.
    """

    name: str
    dtype: str
    dims: tuple[int, ...]
    spans: tuple[Span, ...]
    numbers: tuple[int, ...]
    external: bool

    def read(self, data: bytes) -> tuple[Any, ...]:
        """Its numbers, in a flat tuple; for small tensors of a type that `struct` knows."""
        code = {"float32": "f", "int32": "i", "int64": "q"}[self.dtype]
        raw = b"".join(data[start:end] for start, end in self.spans)
        return self.numbers or struct.unpack(f"<{len(raw) // SIZES[self.dtype]}{code}", raw)


@dataclass(frozen=True)
class Node:
    """An operator's use. `subgraph` names an attribute that holds a graph, "" = none."""

    name: str
    operator: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]  # int, float, str, Tensor, or a tuple of numbers
    subgraph: str


@dataclass(frozen=True)
class ValueInfo:
    """An input or output of the graph; a dimension without a size is a text, perhaps empty."""

    name: str
    dtype: str
    dims: tuple[int | str, ...] | None


@dataclass(frozen=True)
class Model:
    """What the checks need of an ONNX file; the last three: how many there are."""

    data: bytes = field(repr=False)
    ir_version: int
    opsets: tuple[tuple[str, int], ...]  # domain, version
    properties: Mapping[str, str]
    nodes: tuple[Node, ...]
    initializers: tuple[Tensor, ...]
    inputs: tuple[ValueInfo, ...]
    outputs: tuple[ValueInfo, ...]
    functions: int
    training_info: int
    sparse_initializers: int


def read_model(data: bytes) -> Model:
    """The ONNX model in these bytes.

    Raises:
        BundleError: they are not a well-formed ONNX file, or use a part of the format that no
            exported network needs.
    """
    return _Reader(data).model((0, len(data)))


class _Field(NamedTuple):
    name: str
    wire: int
    repeated: bool
    packed: bool  # whether its numbers may also come as one run of bytes
    entry: bool  # whether it is a StringStringEntryProto, of no interest but well-formed


_Schema = Mapping[int, _Field]
_VARINT, _BYTES, _FIXED32 = 0, 2, 5
_WIRE = {"int": _VARINT, "bytes": _BYTES, "entry": _BYTES, "float": _FIXED32}


def _schema(text: str) -> _Schema:
    """The fields of "name number kind, ..."; kinds int, float, bytes, entry; * = repeated."""
    fields = {}
    for name, number, kind in (line.split() for line in text.split(",")):
        repeated, wire = kind[-1] == "*", _WIRE[kind.rstrip("*")]
        packed = repeated and wire != _BYTES
        fields[int(number)] = _Field(name, wire, repeated, packed, kind == "entry*")
    return fields


_MODEL = _schema("""ir_version 1 int, producer_name 2 bytes, producer_version 3 bytes,
    domain 4 bytes, model_version 5 int, doc_string 6 bytes, graph 7 bytes, opset_import 8 bytes*,
    metadata_props 14 bytes*, training_info 20 bytes*, functions 25 bytes*""")
_OPSET = _schema("domain 1 bytes, version 2 int")
_ENTRY = _schema("key 1 bytes, value 2 bytes")
_GRAPH = _schema("""node 1 bytes*, name 2 bytes, initializer 5 bytes*, doc_string 10 bytes,
    input 11 bytes*, output 12 bytes*, value_info 13 bytes*, sparse_initializer 15 bytes*,
    metadata_props 16 entry*""")
_NODE = _schema("""input 1 bytes*, output 2 bytes*, name 3 bytes, op_type 4 bytes,
    attribute 5 bytes*, doc_string 6 bytes, domain 7 bytes, metadata_props 9 entry*""")
_ATTRIBUTE = _schema("""name 1 bytes, f 2 float, i 3 int, s 4 bytes, t 5 bytes, g 6 bytes,
    floats 7 float*, ints 8 int*, graphs 11 bytes*, doc_string 13 bytes, type 20 int""")
_ATTRIBUTE_TYPES = {1: "f", 2: "i", 3: "s", 4: "t", 5: "g", 6: "floats", 7: "ints", 10: "graphs"}
_TENSOR = _schema("""dims 1 int*, data_type 2 int, float_data 4 float*, int32_data 5 int*,
    int64_data 7 int*, name 8 bytes, raw_data 9 bytes, doc_string 12 bytes,
    external_data 13 bytes*, data_location 14 int, metadata_props 16 entry*""")
_VALUE_INFO = _schema("name 1 bytes, type 2 bytes, doc_string 3 bytes, metadata_props 4 entry*")
_TYPE = _schema("tensor_type 1 bytes, denotation 6 bytes")
_TENSOR_TYPE = _schema("elem_type 1 int, shape 2 bytes")
_SHAPE = _schema("dim 1 bytes*")
_DIM = _schema("dim_value 1 int, dim_param 2 bytes, denotation 3 bytes")


def _signed(value: int) -> int:
    """An int64 from its two's complement."""
    return value - (value >> 63 << 64)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.left = MAX_FIELDS

    def refuse(self, at: int, what: str) -> NoReturn:
        raise BundleError(
            f"not a valid ONNX model: {what} (byte {at} of {len(self.data)}); copy the bundle "
            "again, or export the model again"
        )

    # The wire format

    def varint(self, at: int, end: int) -> tuple[int, int]:
        """The number at `at`, at most 64 bits in as few bytes as possible, and what follows."""
        data, value, shift = self.data, 0, 0
        for i in range(at, min(at + 10, end)):
            byte = data[i]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >> 64 or (byte == 0 and i > at):
                    self.refuse(at, "a number of more bits or bytes than it may have")
                return value, i + 1
            shift += 7
        return self.refuse(at, "a number that does not end")

    def message(self, span: Span, schema: _Schema) -> dict[str, Any]:
        """The fields of a message by name: int, a span of bytes, or a list of them."""
        data, (at, end) = self.data, span
        result: dict[str, Any] = {}
        while at < end:
            start = at
            key, at = (data[at], at + 1) if data[at] < 0x80 else self.varint(at, end)
            wire = key & 7
            value: Any = 0
            if wire == _FIXED32:
                value, at = (at, at + 4), at + 4
            elif wire in (_VARINT, _BYTES):
                short = at < end and data[at] < 0x80
                value, at = (data[at], at + 1) if short else self.varint(at, end)
                if wire == _BYTES:
                    value, at = (at, at + value), at + value
                else:
                    value = _signed(value)
            if at > end:
                self.refuse(start, f"field {key >> 3} ends {at - end} bytes behind its message")
            self.left -= 1
            if self.left < 0:
                self.refuse(start, f"more than {MAX_FIELDS} fields")
            field = schema.get(key >> 3)
            if field is None:
                self.refuse(start, f"field {key >> 3}, which this version does not know")
            name, expected, repeated, packed, entry = field
            if wire != expected and not (packed and wire == _BYTES):
                self.refuse(start, f"{name} has wire type {wire}, expected {expected}")
            if entry:
                self.message(value, _ENTRY)
            if not repeated:
                if name in result:
                    self.refuse(start, f"{name} comes twice")
                result[name] = value
            elif wire == _BYTES and expected == _VARINT:
                result.setdefault(name, []).extend(self.packed(value))
            elif name in result:
                result[name].append(value)
            else:
                result[name] = [value]
        return result

    def packed(self, span: Span) -> list[int]:
        at, end = span
        numbers = []
        while at < end:
            value, at = self.varint(at, end)
            numbers.append(_signed(value))
            self.left -= 1
            if self.left < 0:
                self.refuse(at, f"more than {MAX_FIELDS} fields")
        return numbers

    def text(self, span: Span, limit: int = MAX_TEXT) -> str:
        start, end = span
        if end - start > limit:
            self.refuse(start, f"a text of {end - start} bytes, expected at most {limit}")
        try:
            return self.data[start:end].decode()
        except UnicodeDecodeError:
            self.refuse(start, "a text that is not UTF-8")

    def texts(self, spans: list[Span]) -> tuple[str, ...]:
        return tuple(self.text(span) for span in spans)

    def floats(self, spans: list[Span]) -> tuple[float, ...]:
        raw = b"".join(self.data[start:end] for start, end in spans)
        if len(raw) % 4 or len(raw) > MAX_TEXT:
            self.refuse(spans[0][0], f"{len(raw)} bytes of floats")
        return struct.unpack(f"<{len(raw) // 4}f", raw)

    # The messages of onnx.proto

    def model(self, span: Span) -> Model:
        model = self.message(span, _MODEL)
        graph = self.message(model.get("graph", (0, 0)), _GRAPH)
        opsets = [self.message(entry, _OPSET) for entry in model.get("opset_import", [])]
        properties: dict[str, str] = {}
        for part in model.get("metadata_props", []):
            entry = self.message(part, _ENTRY)
            key = self.text(entry.get("key", (0, 0)))
            if key in properties:
                self.refuse(part[0], f"property {key!r} comes twice")
            properties[key] = self.text(entry.get("value", (0, 0)), MAX_PROPERTY)
        for value in graph.get("value_info", []):
            self.value_info(value)  # well-formed, but not believed: sizes are inferred
        return Model(
            data=self.data,
            ir_version=model.get("ir_version", 0),
            opsets=tuple((self.text(o.get("domain", (0, 0))), o.get("version", 0)) for o in opsets),
            properties=properties,
            nodes=tuple(self.node(node) for node in graph.get("node", [])),
            initializers=tuple(self.tensor(tensor) for tensor in graph.get("initializer", [])),
            inputs=tuple(self.value_info(value) for value in graph.get("input", [])),
            outputs=tuple(self.value_info(value) for value in graph.get("output", [])),
            functions=len(model.get("functions", [])),
            training_info=len(model.get("training_info", [])),
            sparse_initializers=len(graph.get("sparse_initializer", [])),
        )

    def node(self, span: Span) -> Node:
        node = self.message(span, _NODE)
        attributes: dict[str, Any] = {}
        subgraph = ""
        for part in node.get("attribute", []):
            name, kind, value = self.attribute(part)
            if name in attributes:
                self.refuse(part[0], f"attribute {name!r} comes twice")
            attributes[name] = value
            subgraph = name if kind in ("g", "graphs") else subgraph
        return Node(
            name=self.text(node.get("name", (0, 0))),
            operator=self.text(node.get("op_type", (0, 0))),
            domain=self.text(node.get("domain", (0, 0))),
            inputs=self.texts(node.get("input", [])),
            outputs=self.texts(node.get("output", [])),
            attributes=attributes,
            subgraph=subgraph,
        )

    def attribute(self, span: Span) -> tuple[str, str, Any]:
        """Name, kind and value."""
        fields = self.message(span, _ATTRIBUTE)
        name = self.text(fields.pop("name", (0, 0)))
        fields.pop("doc_string", None)
        number = fields.pop("type", 0)
        kind = _ATTRIBUTE_TYPES.get(number, "")
        if not name or not kind or not fields.keys() <= {kind}:
            self.refuse(span[0], f"attribute {name!r} of type {number} holds {sorted(fields)}")
        given = fields.get(kind)
        match kind:
            case "i":
                return name, kind, given or 0
            case "f":
                return name, kind, self.floats([given])[0] if given else 0.0
            case "s":
                return name, kind, self.text(given or (0, 0))
            case "t":
                return name, kind, self.tensor(given or (0, 0))
            case "ints":
                return name, kind, tuple(given or ())
            case "floats":
                return name, kind, self.floats(given) if given else ()
        return name, kind, None

    def tensor(self, span: Span) -> Tensor:
        fields = self.message(span, _TENSOR)
        name, dims = self.text(fields.get("name", (0, 0))), tuple(fields.get("dims", []))
        if len(dims) > MAX_RANK or min(dims, default=0) < 0:
            self.refuse(span[0], f"tensor {name!r} has dims {dims[:20]}, expected 0..{MAX_RANK}, "
                                 "none negative")  # fmt: skip
        dtype, size = self.dtype(span[0], fields.get("data_type", 0))
        external = bool(fields.get("external_data") or fields.get("data_location"))
        typed = {"float32": "float_data", "int64": "int64_data"}.get(dtype, "int32_data")
        kinds = {"raw_data", "float_data", "int32_data", "int64_data"} & fields.keys()
        if not kinds <= {"raw_data"} and not kinds <= {typed}:
            self.refuse(span[0], f"{dtype} tensor {name!r} has its data in {sorted(kinds)}")
        numbers = tuple(fields.get(typed, ())) if typed != "float_data" else ()
        spans = tuple(fields.get("float_data", ()))
        if "raw_data" in fields:
            spans = (fields["raw_data"],)
        given = len(numbers) * size + sum(end - start for start, end in spans)
        if not external and given != math.prod(dims) * size:
            self.refuse(span[0], f"{dtype} tensor {name!r} of dims {dims} has {given} bytes, "
                                 f"expected {math.prod(dims) * size}")  # fmt: skip
        return Tensor(name, dtype, dims, spans, numbers, external)

    def value_info(self, span: Span) -> ValueInfo:
        value = self.message(span, _VALUE_INFO)
        type_ = self.message(value.get("type", (0, 0)), _TYPE)
        tensor = self.message(type_.get("tensor_type", (0, 0)), _TENSOR_TYPE)
        dims = None
        if "shape" in tensor:
            parts = self.message(tensor["shape"], _SHAPE).get("dim", [])
            if len(parts) > MAX_RANK:
                self.refuse(span[0], f"{len(parts)} dimensions, expected at most {MAX_RANK}")
            dims = tuple(self.dim(part) for part in parts)
        name = self.text(value.get("name", (0, 0)))
        return ValueInfo(name, self.dtype(span[0], tensor.get("elem_type", 0))[0], dims)

    def dim(self, span: Span) -> int | str:
        dim = self.message(span, _DIM)
        if "dim_value" not in dim:
            return self.text(dim.get("dim_param", (0, 0)))
        if dim["dim_value"] < 0 or "dim_param" in dim:
            self.refuse(span[0], f"a dimension of {dim['dim_value']}, or with a name as well")
        return int(dim["dim_value"])

    def dtype(self, at: int, number: int) -> tuple[str, int]:
        if number not in DTYPES:
            self.refuse(at, f"data type {number}, expected one of {sorted(DTYPES)}")
        return DTYPES[number]
