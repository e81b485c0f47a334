"""Networks of the played TensorRT, and the parser that makes them of ONNX graphs."""

# The classes are named like those they play; see tests.strict.api for what a version shows of them.

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

from tests.strict.arithmetic import element_types
from tests.strict.parser import refusals, shape_inputs, unread

if TYPE_CHECKING:
    from tests.strict.tensorrt import StrictTensorRT

DATA_TYPES: dict[int, str] = {
    TensorProto.FLOAT: "FLOAT",
    TensorProto.FLOAT16: "HALF",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.INT8: "INT8",
    TensorProto.UINT8: "UINT8",
    TensorProto.BOOL: "BOOL",
}


class Parsed:
    """A graph that a parser took, with what is known of its tensors."""

    def __init__(self, model: ModelProto, folder: Path, types: dict[str, int]) -> None:
        self.model, self.folder, self.types = model, folder, types
        self.shape_inputs = shape_inputs(model)

    def shape(self, value: ValueInfoProto) -> tuple[int | str, ...]:
        """With names for what is not fixed."""
        dims = value.type.tensor_type.shape.dim
        return tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in dims)


class Dims:
    MAX_DIMS = property(lambda self: 8)

    def __init__(self, shape: Any) -> None:
        self._shape = tuple(int(n) for n in shape)

    def __len__(self) -> int:
        return len(self._shape)

    def __getitem__(self, index: Any) -> Any:
        return self._shape[index]

    def __repr__(self) -> str:
        return repr(self._shape)


class ITensor:
    _trt: StrictTensorRT

    def _setup(self, parsed: Parsed, name: str, value: ValueInfoProto | None) -> None:
        self._parsed, self._name, self._value = parsed, name, value

    @property
    def name(self) -> str:
        return self._name

    @property
    def shape(self) -> Any:
        known = () if self._value is None else self._parsed.shape(self._value)
        return self._trt.api.Dims([n if isinstance(n, int) else -1 for n in known])

    @property
    def dtype(self) -> Any:
        return self._trt.api.DataType[DATA_TYPES[self._parsed.types[self._name]]]

    @property
    def is_shape_tensor(self) -> bool:
        return self._name in self._parsed.shape_inputs

    @property
    def is_execution_tensor(self) -> bool:
        return not self.is_shape_tensor

    @property
    def is_network_input(self) -> bool:
        return any(v.name == self._name for v in self._parsed.model.graph.input)

    @property
    def is_network_output(self) -> bool:
        return any(v.name == self._name for v in self._parsed.model.graph.output)


class ILayer:
    _trt: StrictTensorRT

    def _setup(self, parsed: Parsed, node: NodeProto) -> None:
        self._parsed, self._node = parsed, node
        ignored = {*unread(node), *(i.name for i in parsed.model.graph.initializer)}
        self._inputs = [name for name in node.input if name and name not in ignored]

    @property
    def name(self) -> str:
        return str(self._node.name)

    @property
    def metadata(self) -> str:
        return f"[ONNX Layer: {self._node.name}]"

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_outputs(self) -> int:
        return len(self._node.output)

    def get_input(self, index: int) -> Any:
        return self._trt.make("ITensor", self._parsed, self._inputs[index], None)

    def get_output(self, index: int) -> Any:
        return self._trt.make("ITensor", self._parsed, self._node.output[index], None)


class INetworkDefinition:
    _trt: StrictTensorRT

    def _setup(self, flags: int) -> None:
        self._flags = flags
        self._parsed: Parsed | None = None
        self.__dict__["name"] = "Unnamed Network 0"

    @property
    def _graph(self) -> Any:
        return onnx.GraphProto() if self._parsed is None else self._parsed.model.graph

    @property
    def _fed(self) -> list[ValueInfoProto]:
        stored = {i.name for i in self._graph.initializer}
        return [v for v in self._graph.input if v.name not in stored]

    @property
    def flags(self) -> int:
        return self._flags

    def get_flag(self, flag: Any) -> bool:
        return bool(self._flags >> int(flag) & 1)

    @property
    def num_inputs(self) -> int:
        return len(self._fed)

    @property
    def num_outputs(self) -> int:
        return len(self._graph.output)

    @property
    def num_layers(self) -> int:
        return len(self._graph.node)

    def get_input(self, index: int) -> Any:
        value = self._fed[index]
        return self._trt.make("ITensor", self._parsed, value.name, value)

    def get_output(self, index: int) -> Any:
        value = self._graph.output[index]
        return self._trt.make("ITensor", self._parsed, value.name, value)

    def get_layer(self, index: int) -> Any:
        return self._trt.make("ILayer", self._parsed, self._graph.node[index])

    def __len__(self) -> int:
        return self.num_layers

    def __getitem__(self, arg0: int) -> Any:
        return self.get_layer(arg0)


class ParserError:
    _trt: StrictTensorRT

    def _setup(self, number: int, node: NodeProto | None, why: str) -> None:
        self._number, self._node, self._why = number, node, why

    def code(self) -> Any:
        return self._trt.api.ErrorCode.UNSUPPORTED_NODE

    def desc(self) -> str:
        return self._why

    def file(self) -> str:
        return "ModelImporter.cpp"

    def func(self) -> str:
        return "parseNode"

    def line(self) -> int:
        return 1

    def node(self) -> int:
        return self._number

    def node_name(self) -> str:
        return "" if self._node is None else str(self._node.name)

    def node_operator(self) -> str:
        return "" if self._node is None else str(self._node.op_type)


class OnnxParser:
    _trt: StrictTensorRT

    def __init__(self, network: Any, logger: Any) -> None:
        self._network, self._logger = network, logger
        self._errors: list[Any] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        return self._errors[index]

    def clear_errors(self) -> None:
        self._errors.clear()

    def supports_operator(self, op_name: str) -> bool:
        node = onnx.helper.make_node(op_name, ["x"], ["y"])
        if op_name == "MultiHeadAttention":
            node.domain = "com.microsoft"
        model = onnx.helper.make_model(onnx.helper.make_graph([node], "", [], []))
        return not [*refusals(self._trt.version, model, {})]

    def parse_from_file(self, model: str) -> bool:
        path = Path(model)
        try:
            loaded = onnx.load(path, load_external_data=False)
        except Exception as error:
            return self._refuse(0, None, f"Failed to parse ONNX model from file: {path} ({error})")
        return self._take(loaded, path.parent)

    def parse(self, model: Any, path: str | None = None) -> bool:
        folder = Path.cwd() if path is None else Path(path).parent
        return self._take(onnx.load_model_from_string(bytes(model)), folder)

    def supports_model_v2(self, model: Any, path: str | None = None) -> bool:
        loaded = onnx.load_model_from_string(bytes(model))
        return not [*refusals(self._trt.version, loaded, element_types(loaded))]

    def _take(self, model: ModelProto, folder: Path) -> bool:
        types = element_types(model)
        for number, why in refusals(self._trt.version, model, types):
            node = model.graph.node[number]
            where = f"In node {number} with name: {node.name} and operator: {node.op_type} (parseNode)"
            self._refuse(number, node, f"{where}: UNSUPPORTED_NODE: {why}")
        if self._errors:
            return False
        for initializer in model.graph.initializer:
            for entry in initializer.external_data:
                if entry.key == "location" and not (folder / entry.value).is_file():
                    return self._refuse(0, None, f"Failed to open file: {folder / entry.value}")
        read = {name for node in model.graph.node for name in node.input if name not in unread(node)}
        read |= {value.name for value in model.graph.output}
        for value in model.graph.input:
            if value.name not in read:
                self._trt.log(self._logger, "WARNING", f"Unused Input: {value.name}")
        self._network._parsed = Parsed(model, folder, types)
        return True

    def _refuse(self, number: int, node: NodeProto | None, why: str) -> bool:
        self._errors.append(self._trt.make("ParserError", number, node, why))
        self._trt.log(self._logger, "ERROR", why)
        return False
