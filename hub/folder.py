"""A model's Hugging Face folder on disk: written by export.py, and read back bit for bit.

    model.safetensors   the tensors, under the names that modeling_awd_lm.py has for them
    awd_lm.json         the rest of the saved model: format, args, vocab, tokenizer, metrics, and the tensors' own names
    config.json ...     for Transformers

The last row of the embedding, of an untied decoder and of its bias belongs to `<pad>`, which a saved model lacks.
"""

import contextlib
import json
import math
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.files import MODEL_FORMAT, MODEL_PARTS, check_parts, check_tensors, strip_raw
from utils import RunError, UserError, replacing

CONFIG, TENSORS, REST = "config.json", "model.safetensors", "awd_lm.json"
LEFTOVER = re.compile(r"(.+)[.][0-9a-f]{8}[.]tmp")  # of `replacing`, when it was killed
PAD_BIAS = -1e4  # a probability of 0; not -inf, so that 0 · log p is 0
PADDED = ("model.encoder.weight", "decoder.weight", "decoder.bias")
PLAIN = ("format", "args", "vocab", "tokenizer", "metrics")
# https://huggingface.co/docs/safetensors: its names of dtypes
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def pack_tensors(tensors: dict[str, Tensor]) -> bytes:
    """Tensors as a safetensors file: the header's length in 8 bytes, the header in JSON, the numbers."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts, at = [], 0
    for name, tensor in tensors.items():
        parts.append(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        place = [at, at := at + len(parts[-1])]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def unpack_tensors(data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ValueError, KeyError or TypeError when it is damaged."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            (first, end), dtype = entry["data_offsets"], DTYPES[entry["dtype"]]
            if end - first != math.prod(entry["shape"]) * dtype.itemsize or start + end > len(data) or first < 0:
                raise ValueError(name)
            numbers = torch.frombuffer(bytearray(data[start + first : start + end]), dtype=dtype)
            tensors[name] = numbers.reshape(entry["shape"])
    return tensors


def folder_name(part: str, name: str) -> str:
    """The name of a saved tensor in the folder; `part`: model or criterion."""
    name = strip_raw(name)
    if part == "criterion":
        return f"decoder.{name}"
    return name if name.startswith("decoder.") else f"model.{name}"


def folder_tensors(saved: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a saved model under their names in the folder, with a row for `<pad>`."""
    tensors = {folder_name(part, name): x for part in ("model", "criterion") for name, x in saved[part].items()}
    for name in filter(tensors.__contains__, PADDED):
        x = tensors[name]
        row = x.new_full((1, *x.shape[1:]), PAD_BIAS if name == "decoder.bias" else 0)
        tensors[name] = torch.cat([x, row])
    return tensors


def rest_of(saved: dict[str, Any], place: str) -> str:
    """awd_lm.json: all of a saved model but its tensors, and these tensors' names.

    Raises:
        UserError: JSON would change it.
    """
    rest = {name: saved[name] for name in PLAIN}
    rest["names"] = {part: list(saved[part]) for part in ("model", "criterion")}
    with contextlib.suppress(TypeError, ValueError):
        text = json.dumps(rest)
        if repr(json.loads(text)) == repr(rest):  # 1 and True are equal, and so are 1 and 1.0
            return text
    raise UserError(f"{place}: its args or metrics hold more than plain data; save the model again with main.py")


def read_back(folder: str | Path) -> dict[str, Any]:
    """The contents of the saved model that export.py made a folder of, bit for bit; `harness.files.save` writes them.

    Raises:
        UserError: the folder is not one of export.py, or its files are damaged or do not fit each other.
    """
    try:
        rest = json.loads(Path(folder, REST).read_text("utf-8"))
        tensors = unpack_tensors(Path(folder, TENSORS).read_bytes())
        saved = {name: rest[name] for name in PLAIN}
        for part in ("model", "criterion"):
            saved[part] = {name: tensors.pop(folder_name(part, name)) for name in rest["names"][part]}
        saved["metrics"] = saved.pop("metrics")  # the last part, as in the file
        for name in filter(lambda name: folder_name("model", name) in PADDED, saved["model"]):
            saved["model"][name] = saved["model"][name][:-1].clone()
    except OSError as error:
        where = f"{error.strerror}; give a folder that export.py made"
        raise UserError(f"{error.filename}: {where}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError):  # RecursionError is a RuntimeError
        raise UserError(f"{folder}: is damaged, or not a folder that export.py made; export the model again") from None
    if saved["format"] != MODEL_FORMAT or tensors:
        raise UserError(f"{folder}: holds more than {MODEL_FORMAT!r}; use the version of this toolkit that made it")
    check_parts(saved, MODEL_PARTS, str(folder))
    check_tensors(saved, str(folder))
    return saved


def check_folder(folder: Path, names: Sequence[str], force: bool) -> None:
    """Raises UserError when the folder has content, which is not just what a killed export has left of itself."""
    try:
        there = sorted(os.listdir(folder)) if folder.exists() else []
    except NotADirectoryError:
        raise UserError(f"--out {folder}: is a file; give the name of a folder") from None
    own = {*names} - {CONFIG}  # it is written last
    others = [name for name in there if name not in own and not LEFTOVER.fullmatch(name)]
    if others and not force:
        raise UserError(f"--out {folder}: has content ({others[0]}); give another folder, or --force to write over it")


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Writes all files, or none of them; others in the folder are kept.

    They are written under other names first, and renamed when all are on the disk. config.json, without which nothing
    opens the folder, is removed before the first is renamed, and comes last.

    Raises:
        UserError: there can be no such folder.
        RunError: the disk does not take the files; the folder is as it was.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}; give a folder that can be written to") from None
    try:
        with ExitStack() as stack:
            for name in sorted(files, key=lambda name: name != CONFIG):  # the first one is closed last
                file = stack.enter_context(replacing(folder / name))
                file.write(files[name])
                file.flush()
                os.fsync(file.fileno())
            (folder / CONFIG).unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"--out {folder}: {error.strerror}, and nothing was written; give another folder") from error
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only while it is empty
