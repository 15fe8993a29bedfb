"""Files of torch.save, of torch 0.3 to today, and plain pickles, read without torch.load and without running anything.

    zip (torch 1.6 and later)    NAME/data.pkl, and the bytes of each storage in NAME/data/KEY
    old format                   four pickles (a magic number, a version, sizes of types, the object), a pickled list of
                                 keys, and for each key a length in elements and the bytes of that storage
    a plain pickle               the object; no tensors

What comes out are plain data, bags (`bridges.pickles`) and `Stored` tensors, whose numbers stay in the file until
`read_tensor` is asked for them.
"""

import contextlib
import io
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from bridges.pickles import Bag, DamagedError, Global, read_pickle
from utils import UserError

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C  # the first pickle of the old format
LONGEST_LINE = 2**16  # of names and numbers in a pickle of protocol 0
DTYPES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool,
}  # fmt: skip
# What a wrong byte makes our reader, zipfile, struct and torch raise.
DAMAGED = (DamagedError, zipfile.BadZipFile, struct.error, LookupError, ValueError, RuntimeError, EOFError, OSError)
# How files begin that hold no pickle of torch, and what to do.
SIGNATURES = {
    b"\x1f\x8b": "is compressed; unpack it: tar xzf FILE, or gunzip FILE",
    b"\x89HDF": "is an HDF5 file, of Keras for instance, not of PyTorch",
    b"\x93NUMPY": "is an array of numpy, not a model",
}


@dataclass(frozen=True)
class Storage:
    """A row of numbers in the file; `first` is not 0 for a view of another storage."""

    key: str
    dtype: torch.dtype
    first: int  # element


@dataclass(frozen=True)
class Stored:
    """A tensor whose numbers are in the file."""

    storage: Storage
    offset: int  # elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.storage.dtype.itemsize


def whole_numbers(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(value) is int and value >= 0 for value in values)


def make_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Stored | Bag:
    """The stand-in of torch's functions of this signature; `rest` is about gradients."""
    fits = isinstance(storage, Storage) and whole_numbers((offset,)) and whole_numbers(shape) and whole_numbers(stride)
    if not fits or len(shape) != len(stride) or len(shape) > 8:
        return Bag(Global("torch", "Tensor"), (), called=True)
    return Stored(storage, offset, shape, stride)


def make_parameter(data: Any = None, *rest: Any) -> Any:
    return data


def make_size(*args: Any) -> Any:
    return tuple(args[0]) if args and isinstance(args[0], list | tuple) else ()


def make_subclass(function: Any, kind: Any, args: Any, *rest: Any) -> Any:
    """The stand-in for tensors with attributes: made by `function(*args)`."""
    known = KNOWN.get(str(function)) if isinstance(function, Global) else None
    return known(*args) if known and known is not make_subclass else Bag(kind, args, called=True)


KNOWN: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": make_tensor,
    "torch._utils._rebuild_tensor_v2": make_tensor,
    "torch._utils._rebuild_parameter": make_parameter,
    "torch._utils._rebuild_parameter_with_state": make_parameter,
    "torch.nn.parameter.Parameter": make_parameter,  # torch 0.4 and before
    "torch.autograd.variable.Variable": make_parameter,
    "torch._tensor._rebuild_from_type_v2": make_subclass,
    "torch.Size": make_size,
}


def load_persistent(name: Any) -> Any:
    """What torch's persistent ids stand for: a storage, or the class of a module, which comes with its source."""
    if isinstance(name, tuple) and len(name) > 1 and name[0] == "module":
        return name[1]
    if not isinstance(name, tuple) or len(name) < 5 or name[0] != "storage":
        raise DamagedError("a persistent id that is not torch's")
    kind, key, view = name[1], name[2], name[5] if len(name) > 5 else None
    dtype = DTYPES.get(kind.name.removesuffix("Storage")) if isinstance(kind, Global) else None
    if dtype is None or not isinstance(key, str | int):
        return Bag(kind, (), called=False)
    first = view[1] if isinstance(view, tuple) and len(view) == 3 else 0
    if not whole_numbers((first,)):
        raise DamagedError("a view that begins before its storage")
    return Storage(str(key), dtype, first)


class Bounded:
    """A file for `pickletools`, that asks for no more bytes than there are: Python would make room for them first."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def tell(self) -> int:
        return self.file.tell()

    def read(self, size: int) -> bytes:
        return self.file.read(min(size, max(0, self.size - self.file.tell())))

    def readline(self) -> bytes:
        return self.file.readline(LONGEST_LINE)


class Contents:
    """An open file: the object that it holds, and its storages."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self.file, self.path = file, path
        self.size = os.fstat(file.fileno()).st_size
        self.places: dict[str, tuple[int, int]] = {}  # of the old format: first byte, bytes
        self.archive: zipfile.ZipFile | None = None
        self.prefix = ""
        self.value = self.read_value()

    def read_value(self) -> Any:
        start = self.file.read(512)
        self.file.seek(0)
        for signature, problem in SIGNATURES.items():
            if start.startswith(signature):
                raise UserError(f"{self.path}: {problem}")
        if not start:
            raise UserError(f"{self.path}: is empty; fetch it again")
        if start[8:10] == b'{"':
            raise UserError(f"{self.path}: is a file of safetensors, not of torch.save; give the original file")
        if start[257:262] == b"ustar":
            raise UserError(f"{self.path}: is a tar file, unpacked or of torch 0.1; give the file of the model in it")
        if start.startswith(b"PK\x03\x04"):
            return self.read_zip()
        stream = Bounded(self.file, self.size)
        first = read_pickle(stream, KNOWN, load_persistent)
        return self.read_old(stream) if first == MAGIC_NUMBER else first

    def read_zip(self) -> Any:
        self.archive = zipfile.ZipFile(self.file)
        names = self.archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if not pickles:
            shown = ", ".join(sorted(names)[:3])
            raise UserError(
                f"{self.path}: is a zip archive without a model of torch.save; it holds {shown or 'nothing'}"
            )
        self.prefix = pickles[0].removesuffix("data.pkl")
        if f"{self.prefix}constants.pkl" in names:
            raise UserError(f"{self.path}: is a TorchScript program; save the model's state_dict() with torch.save")
        return read_pickle(io.BytesIO(self.read_record("data.pkl")), KNOWN, load_persistent)

    def read_record(self, name: str) -> bytes:
        """A record of the zip, to its end, where the checksum is compared.

        torch does not compress records. So a small file cannot claim to hold a large one.
        """
        assert self.archive
        info = self.archive.getinfo(self.prefix + name)
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > self.size:
            raise DamagedError("a record that torch does not write")
        return self.archive.read(info)

    def read_old(self, stream: Bounded) -> Any:
        for _ in range(2):  # version, sizes of types
            read_pickle(stream, KNOWN, load_persistent)
        dtypes: dict[str, torch.dtype] = {}

        def load(name: Any) -> Any:
            found = load_persistent(name)
            if isinstance(found, Storage):
                dtypes[found.key] = found.dtype
            return found

        value, keys = read_pickle(stream, KNOWN, load), read_pickle(stream, KNOWN, load_persistent)
        for key in keys if isinstance(keys, list) else []:
            (length,) = struct.unpack("<q", self.file.read(8))
            size, start = length * dtypes[str(key)].itemsize, self.file.tell()
            if length < 0 or size > self.size - start:
                raise DamagedError("a storage that ends after the file")
            self.places[str(key)] = start, size
            self.file.seek(size, os.SEEK_CUR)
        return value

    def storage_bytes(self, key: str) -> bytearray:
        if self.archive:
            return bytearray(self.read_record(f"data/{key}"))
        start, size = self.places[key]
        self.file.seek(start)
        return bytearray(self.file.read(size))

    def read_tensor(self, stored: Stored) -> Tensor:
        """The numbers of a tensor, in its dtype. Raises UserError if they are not all in the file."""
        storage, shape, stride = stored.storage, stored.shape, stored.stride
        with refusing(self.path):
            data, first = self.storage_bytes(storage.key), storage.first + stored.offset
            last = first + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
            count = len(data) // storage.dtype.itemsize
            if last >= count or not 0 < math.prod(shape) <= count:
                raise DamagedError("a tensor that is larger than its storage")
        return torch.frombuffer(data, dtype=storage.dtype).as_strided(shape, stride, first).clone()


@contextlib.contextmanager
def refusing(path: str) -> Iterator[None]:
    """Turns what reading a damaged file can raise into one line.

    Raises:
        UserError: the file is cut, or something else; or memory is short.
    """
    try:
        yield
    except MemoryError:
        raise UserError(f"{path}: takes more memory than there is; convert it on a larger machine") from None
    except DAMAGED:
        raise UserError(f"{path}: is cut, damaged, or no file of torch.save or pickle; fetch it again") from None


@contextlib.contextmanager
def open_contents(path: str) -> Iterator[Contents]:
    """Opens a file of torch.save or a pickle; see `Contents`.

    Raises:
        UserError: it cannot be opened; and see `refusing`.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below; an OSError while reading has another meaning
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; give the path of a file") from None
    with file:
        with refusing(path):
            contents = Contents(file, path)
        yield contents
