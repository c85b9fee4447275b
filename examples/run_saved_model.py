"""Run a SavedModel as a server does: TensorFlow's C library, no TensorFlow or Keras in Python.

    python examples/run_saved_model.py SAVED_MODEL INPUTS.npz OUTPUTS.npz [SIGNATURE]

`INPUTS.npz` has an array for each input of the signature (`serving_default` if none is named), by
name; `OUTPUTS.npz` gets an array for each output, by name, with strings as arrays of text.
The model goes through the C++ SavedModel loader and `Session::Run` with XLA compilation off, which
is what TensorFlow Serving's CPU path does with its default settings. `libtensorflow` is taken out
of the installed tensorflow package, which is located and never imported; so are the operations of
tensorflow-text if it is installed, which TensorFlow Serving has linked in.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import sys
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from saved_model_signatures import Signature, Tensors, read_signatures

# TF_DataType of tensorflow/c/tf_datatype.h, for those that NumPy has too.
DTYPES: dict[int, Any] = {
    1: np.float32,
    2: np.float64,
    3: np.int32,
    4: np.uint8,
    5: np.int16,
    6: np.int8,
    7: np.object_,  # bytes
    9: np.int64,
    10: np.bool_,
    17: np.uint16,
    19: np.float16,
    22: np.uint32,
    23: np.uint64,
}
NUMBERS = {np.dtype(dtype): number for number, dtype in DTYPES.items()}
STRING = 7
ENCODING = "utf-8", "surrogateescape"  # of input and output strings that are text
STRING_SIZE = 24  # bytes of a TF_TString
INVALID_ARGUMENT, UNIMPLEMENTED = 3, 12  # of TF_Code

INT, SIZE, TEXT, POINTER = ctypes.c_int, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_void_p


class Buffer(ctypes.Structure):
    _fields_ = (("data", POINTER), ("length", SIZE), ("deallocator", POINTER))


class Output(ctypes.Structure):
    _fields_ = (("operation", POINTER), ("index", INT))


POINTERS, TEXTS, LONGS, BUFFER, OUTPUTS = map(
    ctypes.POINTER, (POINTER, TEXT, ctypes.c_int64, Buffer, Output)
)
# Result and argument types of each function of tensorflow/c/c_api.h that is called.
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "TF_NewStatus": (POINTER, []),
    "TF_DeleteStatus": (None, [POINTER]),
    "TF_GetCode": (INT, [POINTER]),
    "TF_Message": (TEXT, [POINTER]),
    "TF_LoadLibrary": (POINTER, [TEXT, POINTER]),
    "TF_NewGraph": (POINTER, []),
    "TF_DeleteGraph": (None, [POINTER]),
    "TF_NewBuffer": (BUFFER, []),
    "TF_DeleteBuffer": (None, [BUFFER]),
    "TF_NewSessionOptions": (POINTER, []),
    "TF_DeleteSessionOptions": (None, [POINTER]),
    "TF_SetConfig": (None, [POINTER, TEXT, SIZE, POINTER]),
    "TF_LoadSessionFromSavedModel": (
        POINTER,
        [POINTER, POINTER, TEXT, TEXTS, INT, POINTER, BUFFER, POINTER],
    ),
    "TF_SessionRun": (
        None,
        [POINTER, POINTER, *2 * (OUTPUTS, POINTERS, INT), POINTERS, INT, POINTER, POINTER],
    ),
    "TF_DeleteSession": (None, [POINTER, POINTER]),
    "TF_GraphOperationByName": (POINTER, [POINTER, TEXT]),
    "TF_AllocateTensor": (POINTER, [INT, LONGS, INT, SIZE]),
    "TF_TensorData": (POINTER, [POINTER]),
    "TF_TensorByteSize": (SIZE, [POINTER]),
    "TF_TensorType": (INT, [POINTER]),
    "TF_NumDims": (INT, [POINTER]),
    "TF_Dim": (ctypes.c_int64, [POINTER, INT]),
    "TF_DeleteTensor": (None, [POINTER]),
    "TF_StringInit": (None, [POINTER]),
    "TF_StringCopy": (None, [POINTER, TEXT, SIZE]),
    "TF_StringGetDataPointer": (POINTER, [POINTER]),
    "TF_StringGetSize": (SIZE, [POINTER]),
    "TF_StringDealloc": (None, [POINTER]),
}
# bool tensorflow::DisableXlaCompilation(), which TensorFlow Serving's main() calls.
DISABLE_XLA = "_ZN10tensorflow21DisableXlaCompilationEv"


class ModelError(RuntimeError):
    """An error of the C library, or of this module before the call; `code` is a TF_Code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class SavedModel:
    """A SavedModel in a session of the C library.

    Several threads may call `run` at once. The session is closed when no reference is left.

    Args:
        path: The directory.
        config: A serialized `ConfigProto`, as `--tensorflow_session_config_file` of TensorFlow
            Serving has as text. Empty: the default settings.

    Attributes:
        meta_graph: The `MetaGraphDef` of the tag `serve`, serialized.
        signatures: The signatures by name.
    """

    def __init__(self, path: str | Path, config: bytes = b"") -> None:
        self._library = _library()
        self._graph = self._library.TF_NewGraph()
        self._session, self.meta_graph = self._load(str(path).encode(), config)
        self.signatures = dict(read_signatures(self.meta_graph))
        # Not at exit, when the process frees all memory anyway.
        weakref.finalize(self, _delete, self._library, self._session, self._graph).atexit = False

    def run(
        self, feeds: Mapping[str, Any], signature: str = "serving_default"
    ) -> dict[str, np.ndarray]:
        """Call a signature. Output strings are arrays of bytes. Raises `ModelError`."""
        inputs, outputs = self._signature(signature)
        _check(feeds, inputs, outputs)
        with contextlib.ExitStack() as stack:
            tensors = [stack.enter_context(self._tensor(feeds[name])) for name in inputs]
            fetched = self._run(inputs, tensors, outputs)
            # Before the inputs are freed, whose memory an output may share.
            return dict(zip(outputs, map(self._array, fetched), strict=True))

    def _signature(self, name: str) -> Signature:
        if name not in self.signatures:
            raise ModelError(
                INVALID_ARGUMENT,
                f"Expected a signature of {sorted(self.signatures)}. Received: {name!r}.",
            )
        return self.signatures[name]

    def _load(self, path: bytes, config: bytes) -> tuple[int, bytes]:
        library, meta_graph = self._library, self._library.TF_NewBuffer()
        options, tags = library.TF_NewSessionOptions(), (ctypes.c_char_p * 1)(b"serve")
        try:
            with _status(library) as status:
                library.TF_SetConfig(options, config, len(config), status)
            with _status(library) as status:
                session = library.TF_LoadSessionFromSavedModel(
                    options, None, path, tags, 1, self._graph, meta_graph, status
                )
            return session, ctypes.string_at(meta_graph[0].data, meta_graph[0].length)
        finally:
            library.TF_DeleteSessionOptions(options)
            library.TF_DeleteBuffer(meta_graph)

    def _run(self, inputs: Tensors, tensors: list[int], outputs: Tensors) -> Any:
        fetched = (ctypes.c_void_p * len(outputs))()
        with _status(self._library) as status:
            self._library.TF_SessionRun(
                self._session,
                None,
                self._endpoints(inputs),
                (ctypes.c_void_p * len(tensors))(*tensors),
                len(tensors),
                self._endpoints(outputs),
                fetched,
                len(outputs),
                None,
                0,
                None,
                status,
            )
        return fetched

    def _endpoints(self, tensors: Tensors) -> Any:
        outputs = []
        for tensor_name, _ in tensors.values():
            operation, _, index = tensor_name.partition(":")
            found = self._library.TF_GraphOperationByName(self._graph, operation.encode())
            outputs.append(Output(found, int(index or 0)))
        return (Output * len(outputs))(*outputs)

    @contextlib.contextmanager
    def _tensor(self, value: Any) -> Iterator[int]:
        array = np.asarray(value, order="C")
        if array.dtype.kind in "SU":
            array = array.astype(object)
        if array.dtype not in NUMBERS:
            raise ModelError(INVALID_ARGUMENT, f"No tensor can hold NumPy's {array.dtype}.")
        library, number, strings = self._library, NUMBERS[array.dtype], array.dtype == object
        size = STRING_SIZE * array.size if strings else array.nbytes
        shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        tensor: int = library.TF_AllocateTensor(number, shape, array.ndim, size)
        data = library.TF_TensorData(tensor)
        if strings:
            _copy_strings(library, array, data)
        else:
            ctypes.memmove(data, array.ctypes.data, size)
        try:
            yield tensor
        finally:
            for place in _places(data, array.size) if strings else ():
                library.TF_StringDealloc(place)
            library.TF_DeleteTensor(tensor)

    def _array(self, tensor: int) -> np.ndarray:
        library = self._library
        try:
            shape = [library.TF_Dim(tensor, axis) for axis in range(library.TF_NumDims(tensor))]
            data, number = library.TF_TensorData(tensor), library.TF_TensorType(tensor)
            if number == STRING:
                return _read_strings(library, data, shape)
            values = ctypes.string_at(data, library.TF_TensorByteSize(tensor))
            return np.frombuffer(values, DTYPES[number]).reshape(shape)
        finally:
            library.TF_DeleteTensor(tensor)


def _check(feeds: Mapping[str, Any], inputs: Tensors, outputs: Tensors) -> None:
    if set(feeds) != set(inputs):
        raise ModelError(
            INVALID_ARGUMENT, f"Expected inputs {sorted(inputs)}. Received: {sorted(feeds)}."
        )
    for name, (_, number) in outputs.items():
        if number not in DTYPES:
            raise ModelError(
                UNIMPLEMENTED, f"Output {name!r}: NumPy has no type for TF_DataType {number}."
            )


def _places(data: int, count: int) -> range:
    """The address of each string of a tensor."""
    return range(data or 0, (data or 0) + STRING_SIZE * count, STRING_SIZE)


def _copy_strings(library: Any, array: np.ndarray, data: int) -> None:
    for place, value in zip(_places(data, array.size), array.ravel(), strict=True):
        encoded = value if isinstance(value, bytes) else value.encode(*ENCODING)
        library.TF_StringInit(place)
        library.TF_StringCopy(place, encoded, len(encoded))


def _read_strings(library: Any, data: int, shape: list[int]) -> np.ndarray:
    array = np.empty(shape, object)
    for i, place in enumerate(_places(data, array.size)):
        length = library.TF_StringGetSize(place)
        array.flat[i] = ctypes.string_at(library.TF_StringGetDataPointer(place), length)
    return array


def _delete(library: Any, session: int, graph: int) -> None:
    with _status(library) as status:
        library.TF_DeleteSession(session, status)
    library.TF_DeleteGraph(graph)


@contextlib.contextmanager
def _status(library: Any) -> Iterator[int]:
    """A status for one call; a failure of the call is raised as `ModelError`."""
    status: int = library.TF_NewStatus()
    try:
        yield status
        code = library.TF_GetCode(status)
        if code:
            raise ModelError(code, library.TF_Message(status).decode(errors="replace"))
    finally:
        library.TF_DeleteStatus(status)


@functools.cache
def _library() -> Any:
    folder = _folder("tensorflow")
    if folder is None:
        raise RuntimeError("Expected the tensorflow package, whose C library is used.")
    ctypes.CDLL(str(folder / "libtensorflow_framework.so.2"), ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(folder / "libtensorflow_cc.so.2"), ctypes.RTLD_GLOBAL)
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library[DISABLE_XLA]()
    text = _folder("tensorflow_text")
    for operations in sorted(text.glob("python/ops/*.so")) if text else ():
        with _status(library) as status:
            library.TF_LoadLibrary(str(operations).encode(), status)
    return library


def _folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


def main() -> None:
    saved_model, inputs, outputs, *signature = sys.argv[1:]
    with np.load(inputs) as arrays:
        results = SavedModel(saved_model).run(dict(arrays), *signature)
    imported = {"tensorflow", "tensorflow_text", "keras", "keras_lora"} & sys.modules.keys()
    if imported:
        raise RuntimeError(f"This process must do without {sorted(imported)}.")
    save(outputs, results)


def save(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a NumPy file, with strings as text, since arrays of objects would be pickled."""
    plain = {name: _text(v) if v.dtype.hasobject else v for name, v in arrays.items()}
    np.savez(path, **plain)  # type: ignore[arg-type]


def _text(strings: np.ndarray) -> np.ndarray:
    decoded = [value.decode(*ENCODING) for value in strings.ravel()]
    return np.array(decoded, np.str_).reshape(strings.shape)


if __name__ == "__main__":
    main()
