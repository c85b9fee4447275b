"""Run a SavedModel as a server does: TensorFlow's C library, no TensorFlow or Keras in Python.

    python examples/run_saved_model.py SAVED_MODEL INPUTS.npz OUTPUTS.npz [SIGNATURE]

`INPUTS.npz` holds an array for each input of the signature (`serving_default` unless another one
is named), by name; the outputs are written to `OUTPUTS.npz` likewise. The model goes through the C++ SavedModel loader
and `Session::Run` with XLA compilation off, which is what TensorFlow Serving's CPU path does with
its default settings. `libtensorflow` is taken out of the installed tensorflow package, which is
located and never imported; so are the operations of tensorflow-text, where that is installed. A
server has them linked in.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

# TF_DataType of tensorflow/c/tf_datatype.h, for those that NumPy has too.
DTYPES: dict[int, Any] = {
    1: np.float32,
    2: np.float64,
    3: np.int32,
    4: np.uint8,
    6: np.int8,
    7: np.str_,
    9: np.int64,
    10: np.bool_,
    19: np.float16,
}
STRING = 7
STRING_BYTES = 24  # sizeof(TF_TString)
POINTER = ctypes.c_void_p
# Result and argument types of each function of tensorflow/c/c_api.h that is called.
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "TF_NewStatus": (POINTER, []),
    "TF_GetCode": (ctypes.c_int, [POINTER]),
    "TF_Message": (ctypes.c_char_p, [POINTER]),
    "TF_NewGraph": (POINTER, []),
    "TF_NewBuffer": (POINTER, []),
    "TF_NewSessionOptions": (POINTER, []),
    "TF_LoadSessionFromSavedModel": (
        POINTER,
        [
            POINTER,
            POINTER,
            ctypes.c_char_p,
            ctypes.POINTER(ctypes.c_char_p),
            ctypes.c_int,
            POINTER,
            POINTER,
            POINTER,
        ],
    ),
    "TF_GraphOperationByName": (POINTER, [POINTER, ctypes.c_char_p]),
    "TF_AllocateTensor": (
        POINTER,
        [ctypes.c_int, ctypes.POINTER(ctypes.c_int64), ctypes.c_int, ctypes.c_size_t],
    ),
    "TF_TensorData": (POINTER, [POINTER]),
    "TF_TensorByteSize": (ctypes.c_size_t, [POINTER]),
    "TF_TensorType": (ctypes.c_int, [POINTER]),
    "TF_NumDims": (ctypes.c_int, [POINTER]),
    "TF_Dim": (ctypes.c_int64, [POINTER, ctypes.c_int]),
    "TF_DeleteTensor": (None, [POINTER]),
    "TF_LoadLibrary": (POINTER, [ctypes.c_char_p, POINTER]),
    "TF_StringInit": (None, [POINTER]),
    "TF_StringCopy": (None, [POINTER, ctypes.c_char_p, ctypes.c_size_t]),
    "TF_StringGetDataPointer": (POINTER, [POINTER]),
    "TF_StringGetSize": (ctypes.c_size_t, [POINTER]),
}
# bool tensorflow::DisableXlaCompilation(), which TensorFlow Serving's main() calls.
DISABLE_XLA = "_ZN10tensorflow21DisableXlaCompilationEv"


class Buffer(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("length", ctypes.c_size_t),
        ("deallocator", ctypes.c_void_p),
    )


class Output(ctypes.Structure):
    _fields_ = (("operation", ctypes.c_void_p), ("index", ctypes.c_int))


Signature = dict[str, tuple[str, int]]  # name -> tensor name in the graph, TF_DataType


class SavedModel:
    """A SavedModel in a session of the C library."""

    def __init__(self, path: str | Path, signature: str = "serving_default") -> None:
        self._library = _load_library()
        self._status = self._library.TF_NewStatus()
        for path_of_operations in _text_operations():
            self._library.TF_LoadLibrary(str(path_of_operations).encode(), self._status)
            self._check("loading tensorflow-text for")
        self._graph = self._library.TF_NewGraph()
        meta_graph = self._library.TF_NewBuffer()
        self._session = self._library.TF_LoadSessionFromSavedModel(
            self._library.TF_NewSessionOptions(),
            None,
            str(path).encode(),
            (ctypes.c_char_p * 1)(b"serve"),
            1,
            self._graph,
            meta_graph,
            self._status,
        )
        self._check("loading")
        buffer = ctypes.cast(meta_graph, ctypes.POINTER(Buffer))[0]
        signatures = dict(_signatures(ctypes.string_at(buffer.data, buffer.length)))
        self.inputs, self.outputs = signatures[signature]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One call of the signature. Raises `ValueError` for wrong names or types."""
        if set(feeds) != set(self.inputs):
            raise ValueError(f"Expected inputs {sorted(self.inputs)}. Received: {sorted(feeds)}.")
        tensors = [self._tensor(name, feeds[name], self.inputs[name][1]) for name in self.inputs]
        fetched = (ctypes.c_void_p * len(self.outputs))()
        self._library.TF_SessionRun(
            ctypes.c_void_p(self._session),
            None,
            self._endpoints(self.inputs),
            (ctypes.c_void_p * len(tensors))(*tensors),
            len(tensors),
            self._endpoints(self.outputs),
            fetched,
            len(self.outputs),
            None,
            0,
            None,
            ctypes.c_void_p(self._status),
        )
        for tensor in tensors:
            self._library.TF_DeleteTensor(tensor)
        self._check("running")
        return {name: self._array(t) for name, t in zip(self.outputs, fetched, strict=True)}

    def _check(self, doing: str) -> None:
        if self._library.TF_GetCode(self._status):
            message = self._library.TF_Message(self._status).decode()
            raise RuntimeError(f"{doing} the SavedModel failed: {message}")

    def _endpoints(self, signature: Signature) -> Any:
        outputs = []
        for tensor_name, _ in signature.values():
            operation, _, index = tensor_name.partition(":")
            found = self._library.TF_GraphOperationByName(self._graph, operation.encode())
            outputs.append(Output(found, int(index or 0)))
        return (Output * len(outputs))(*outputs)

    def _tensor(self, name: str, value: np.ndarray, dtype: int) -> int:
        if value.dtype.type is not DTYPES[dtype]:
            raise ValueError(
                f"Input {name!r}: expected {np.dtype(DTYPES[dtype])}. Received: {value.dtype}."
            )
        value = np.ascontiguousarray(value)
        shape = (ctypes.c_int64 * value.ndim)(*value.shape)
        size = STRING_BYTES * value.size if dtype == STRING else value.nbytes
        tensor: int = self._library.TF_AllocateTensor(dtype, shape, value.ndim, size)
        if dtype == STRING:
            for place, text in zip(self._strings(tensor), value.flat, strict=True):
                self._library.TF_StringInit(place)
                self._library.TF_StringCopy(place, text.encode(), len(text.encode()))
        else:
            ctypes.memmove(self._library.TF_TensorData(tensor), value.ctypes.data, value.nbytes)
        return tensor

    def _array(self, tensor: int) -> np.ndarray:
        library = self._library
        shape = [library.TF_Dim(tensor, axis) for axis in range(library.TF_NumDims(tensor))]
        if library.TF_TensorType(tensor) == STRING:
            array = np.array([self._text(place) for place in self._strings(tensor)], np.str_)
        else:
            size = library.TF_TensorByteSize(tensor)
            data = ctypes.string_at(library.TF_TensorData(tensor), size)
            array = np.frombuffer(data, DTYPES[library.TF_TensorType(tensor)])
        library.TF_DeleteTensor(tensor)
        return array.reshape(shape)

    def _strings(self, tensor: int) -> range:
        """The address of each string of a tensor."""
        first = self._library.TF_TensorData(tensor) or 0
        return range(first, first + self._library.TF_TensorByteSize(tensor), STRING_BYTES)

    def _text(self, place: int) -> str:
        size = self._library.TF_StringGetSize(place)
        return ctypes.string_at(self._library.TF_StringGetDataPointer(place), size).decode()


def _folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _text_operations() -> list[Path]:
    folder = _folder("tensorflow_text")
    return [] if folder is None else sorted(folder.glob("python/ops/*.so"))


def _load_library() -> Any:
    folder = _folder("tensorflow")
    if folder is None:
        raise RuntimeError("Expected the tensorflow package, whose C library is used.")
    ctypes.CDLL(str(folder / "libtensorflow_framework.so.2"), ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(folder / "libtensorflow_cc.so.2"), ctypes.RTLD_GLOBAL)
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library[DISABLE_XLA]()
    return library


def _signatures(meta_graph: bytes) -> Iterator[tuple[str, tuple[Signature, Signature]]]:
    """The `signature_def` map, field 5 of a `MetaGraphDef`, read off the wire format."""
    for number, entry in _fields(meta_graph):
        if number == 5:
            pair = dict(_fields(entry))
            sides: dict[int, Signature] = {1: {}, 2: {}}
            for side, item in _fields(pair.get(2, b"")):
                if side in sides:
                    named = dict(_fields(item))
                    info = dict(_fields(named.get(2, b"")))
                    if 1 in info:
                        sides[side][named[1].decode()] = info[1].decode(), info.get(2, 0)
            yield pair[1].decode(), (sides[1], sides[2])


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protocol buffer message."""
    position = 0

    def varint() -> int:
        nonlocal position
        result = shift = 0
        while True:
            byte = message[position]
            position += 1
            result |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return result

    while position < len(message):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        elif key & 7 == 2:
            length = varint()
            yield key >> 3, message[position : position + length]
            position += length
        else:
            position += {1: 8, 5: 4}[key & 7]


def main() -> None:
    saved_model, inputs, outputs, *signature = sys.argv[1:]
    with np.load(inputs) as arrays:
        results = SavedModel(saved_model, *signature).run(dict(arrays))
    imported = {"tensorflow", "tensorflow_text", "keras", "keras_lora"} & sys.modules.keys()
    if imported:
        raise RuntimeError(f"This process must do without {sorted(imported)}.")
    np.savez(outputs, **results)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
