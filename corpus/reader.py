"""Files of tensors that are read without believing them: saved models, states, statistics, cached texts.

torch.save writes a zip: `data.pkl`, a pickle of the plain data, and one uncompressed record per tensor. torch.load
compares no checksum, takes any size that the pickle claims, and reads past the end of a record that is shorter.
So four things are checked before torch.load, with `weights_only=True`, sees the file:

    directory   there is one, at the end of the file; no record is compressed; together they fit into the file
    checksums   the CRC-32 of every record
    opcodes     of the pickle: only those of plain data and tensors, and few lists, dicts and tuples
    tree        of the pickle, built without its tensors: no class but those of tensors, not deep, no list in it again
                and again; every tensor lies inside its record
"""

import errno
import math
import os
import pickle
import stat
import struct
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from io import BufferedReader, BytesIO
from typing import Any, BinaryIO, NamedTuple, NoReturn
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import torch

from utils import out_of_memory

CHUNK = 1 << 20  # bytes of a record read at once
MOST_RECORDS = 1 << 18
DEPTH = 16  # of lists in dicts in lists; a state has 5
DIMENSIONS = 8  # of a tensor

# The opcodes of plain data and tensors, and the bytes of each. X, \x8a and c are followed by a text, a number, a name.
OPCODES = {
    **dict.fromkeys(b".(N\x88\x89]ae}su)t\x85\x86\x87QR", 1),  # stop, mark, constants, containers, tensors
    **dict.fromkeys(b"\x80qhK\x8a", 2) | dict.fromkeys(b"M", 3) | dict.fromkeys(b"rjJX", 5) | dict.fromkeys(b"G", 9),
    ord(pickle.GLOBAL): 1,
}
CONTAINERS = frozenset(pickle.MARK + b"]})t\x85\x86\x87R")  # the opcodes that make a list, a dict, a tuple, a tensor
WORD, NUMBER, NAME, PUT = b"X\x8acq"
LONG_PUT = ord(pickle.LONG_BINPUT)
DTYPES = {
    f"{name}Storage": dtype
    for name, dtype in {
        **{"Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16},
        **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Byte": torch.uint8, "Bool": torch.bool},
    }.items()
}


class DamagedError(Exception):
    """A file is not what torch.save wrote, or claims what cannot be; the text says why."""


class ForbiddenError(Exception):
    """A file holds more than tensors and plain data."""


class Storage(NamedTuple):
    """What a file claims of a record: how many numbers it holds, and of what type."""

    dtype: torch.dtype
    record: str
    numbers: int


class Claim(NamedTuple):
    """What a file claims of a tensor: the arguments of `torch._utils._rebuild_tensor_v2`."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool
    hooks: OrderedDict[Any, Any]


def open_file(path: str | os.PathLike[str]) -> BufferedReader:
    """Opens a file to read; OSError for a folder, and at once for a pipe or a device."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # does not wait for a pipe's writer

    file = open(path, "rb", opener=opener)  # noqa: SIM115 - it is handed over
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "is a pipe or a device, not a file", str(path))
    return file


def read_tensors(file: BinaryIO, mmap: bool = False) -> Any:
    """The plain data and CPU tensors of a file from `open_file`.

    `mmap`: map the tensors into memory instead of reading them. Their checksums are then not compared.

    Raises:
        DamagedError, ForbiddenError: see there.
    """
    try:
        check_file(file, checksums=not mmap)
        file.seek(0)
        with warnings.catch_warnings(action="ignore"):
            return torch.load(file.name if mmap else file, map_location="cpu", weights_only=True, mmap=mmap)
    except (DamagedError, ForbiddenError):
        raise
    except Exception as error:  # a damaged file can raise anything: BadZipFile, IndexError, OSError, ...
        if out_of_memory(error):
            raise
        raise DamagedError("it is no file of torch.save") from error


def check_file(file: BinaryIO, checksums: bool) -> None:
    """Raises DamagedError or ForbiddenError unless torch.load can read the file safely."""
    check_directory(file)
    with ZipFile(file) as archive:
        infos = archive.infolist()
        root = infos[0].filename.partition("/")[0]  # as torch finds it
        records = {info.filename.removeprefix(f"{root}/").lower(): info for info in infos}  # torch ignores case
        if len(records) != len(infos):
            raise DamagedError("two records have one name")
        if any(info.compress_type != ZIP_STORED or info.compress_size != info.file_size for info in infos):
            raise DamagedError("a record is compressed")
        if sum(info.file_size for info in infos) > os.fstat(file.fileno()).st_size:
            raise DamagedError("its records are larger than the file")
        if checksums:
            for info in infos:
                with archive.open(info) as record:  # raises BadZipFile at its end when the CRC-32 differs
                    while record.read(CHUNK):
                        pass
        data = archive.read(records["data.pkl"])
    scan_opcodes(data, len(records))
    tensor_bytes = sum(info.file_size for name, info in records.items() if name.startswith("data/"))
    check_tree(TreeReader(data, records).load(), 4 * len(data), 2 * tensor_bytes)


def check_directory(file: BinaryIO) -> None:
    """Raises DamagedError unless the zip has one directory, at its end, that every reader takes for the one."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 98))
    tail = file.read().rjust(98, b"\0")  # two records of a zip of more than 4 GiB, which torch always writes; the end
    *_, count, length, start, comment = struct.unpack("<4s4H2LH", tail[76:])
    end = size - 22
    if tail[56:60] == b"PK\6\7":
        (here,) = struct.unpack("<8xQ4x", tail[60:76].rjust(20, b"\0"))
        *_, count, length, start = struct.unpack("<4sQ2H2L4Q", tail[:56])
        end = size - 98
        if here != end or tail[:4] != b"PK\6\6":
            raise DamagedError("its directory is not at its end")
    if tail[76:80] != b"PK\5\6" or comment or start + length != end:
        raise DamagedError("its directory is not at its end")
    if not 0 < count <= MOST_RECORDS:
        raise DamagedError(f"it has {count} records")


def scan_opcodes(data: bytes, records: int) -> None:
    """Goes through a pickle without building anything: 0.2 s for a vocabulary of 267,735 words.

    Python's reader would allocate what an opcode claims (a memo of 64 GiB), and far more than the file's size for many
    small lists.

    Raises:
        ForbiddenError: it has an opcode of something else.
        DamagedError: it ends too early, or has more lists, dicts and tuples than its tensors explain.
    """
    at = puts = containers = 0
    sizes, end, unpack = OPCODES, len(data), struct.Struct("<I").unpack_from
    most = 1000 + 32 * records + end // 1000
    while at < end:
        opcode = data[at]
        if opcode not in sizes:
            raise ForbiddenError
        if opcode == WORD:
            at += unpack(data, at + 1)[0]
        elif opcode in (PUT, LONG_PUT):
            if puts != (data[at + 1] if opcode == PUT else unpack(data, at + 1)[0]):
                raise DamagedError("its pickle is not one of torch.save")
            puts += 1
        elif opcode == NUMBER:
            if data[at + 1] > 8:
                raise DamagedError("a number has more than 64 bits")
            at += data[at + 1]
        elif opcode == NAME:
            at = data.index(b"\n", data.index(b"\n", at) + 1)
        elif opcode in CONTAINERS:
            containers += 1
            if containers > most:
                raise DamagedError("it has far more lists than tensors")
        at += sizes[opcode]
    if at != end or not data.endswith(pickle.STOP):
        raise DamagedError("its pickle is cut")


class TreeReader(pickle.Unpickler):
    """The tree of a pickle with a `Claim` in place of each tensor. Nothing of the file is called."""

    def __init__(self, data: bytes, records: dict[str, ZipInfo]) -> None:
        super().__init__(BytesIO(data))
        self.records, self.storages = records, dict[str, Storage]()

    def find_class(self, module: str, name: str) -> Any:
        """The class or type of numbers that a pickle of tensors names; ForbiddenError for any other."""
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return Claim
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise ForbiddenError

    def persistent_load(self, pid: Any) -> Storage:
        """What the file claims of a record; DamagedError unless that is the record's size."""
        kind, dtype, key, _, numbers = pid
        if kind != "storage" or type(key) is not str or type(numbers) is not int or type(dtype) is not torch.dtype:
            raise DamagedError("a tensor has no numbers")
        storage = self.storages.setdefault(key, Storage(dtype, key, numbers))
        size = self.records[f"data/{key}".lower()].file_size
        if storage != (dtype, key, numbers) or numbers * dtype.itemsize != size:
            raise DamagedError("a tensor has not the size of its record")
        return storage


def check_tree(tree: Any, budget: int, most_bytes: int) -> None:
    """Raises DamagedError or ForbiddenError when a tree is too deep or too large, or holds an object or odd tensors.

    budget: the most values and characters, one that is there several times counted each time.
    most_bytes: of all tensors together, twice what the records hold: a tied weight can have two names, not a hundred.
    """
    stack = [(tree, 0)]
    while stack:
        node, depth = stack.pop()
        kind = type(node)
        inside: Sequence[Any] = ()
        if kind in (dict, OrderedDict):
            if not {type(key) for key in node} <= {str, int}:
                raise DamagedError("a key is neither a text nor a number")
            names = [key for key in node if type(key) is str]
            inside = list(node.values())
            budget -= check_texts(names)
        elif kind in (list, tuple):
            inside = node
            if kind is list and set(map(type, node)) == {str}:  # a vocabulary
                inside = ()
                budget -= check_texts(node, strict=True)
        elif kind is str:
            budget -= check_texts([node])
        elif kind is Claim:
            most_bytes -= check_claim(node)
        elif node is not None and kind not in (bool, int, float):
            raise ForbiddenError
        budget -= 1 + len(inside)
        if depth > DEPTH or budget < 0 or most_bytes < 0:
            raise DamagedError("it claims to hold more than it does")
        stack += [(value, depth + 1) for value in inside]


def check_texts(texts: list[str], strict: bool = False) -> int:
    """How many texts and characters these are; `strict`: DamagedError for half a character.

    Names of files that are not UTF-8 have some, and stand in the settings.
    """
    try:
        return len(texts) + len("".join(texts).encode(errors="strict" if strict else "surrogatepass"))
    except UnicodeEncodeError:
        raise DamagedError("a text has half a character") from None


def check_claim(claim: Claim) -> int:
    """The bytes of a tensor; DamagedError unless they lie in its record, each number once."""
    storage, offset, size, stride, requires_grad, hooks = claim
    if type(storage) is not Storage or requires_grad is not False or type(hooks) is not OrderedDict or hooks:
        refuse_claim()
    if type(size) is not tuple or type(stride) is not tuple or not len(size) == len(stride) <= DIMENSIONS:
        refuse_claim()
    if any(type(number) is not int or number < 0 for number in (offset, *size, *stride)):
        refuse_claim()
    count, last = math.prod(size), offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count > storage.numbers or (count and last >= storage.numbers):
        refuse_claim()
    return count * storage.dtype.itemsize


def refuse_claim() -> NoReturn:
    raise DamagedError("a tensor is not in its record")
