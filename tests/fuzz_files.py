"""Damaged files by the thousand: models, states, statistics, corpus caches, tokenizers.

    python tests/fuzz_files.py 5000     # variants of each kind of file; prints a summary, ends with status 1 on a fault

A variant has damaged bytes, or holds a value of another type at a place of its tree, written anew with sound checksums.
Each has to give what the sound file gives, or one error of one line. Variant i of a kind is the same in every run.
"""

import contextlib
import copy
import io
import json
import math
import os
import random
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(1, str(Path(__file__).parent.parent))

import torch
import toys
from torch import Tensor

import dynamiceval
import prepare
import train
from corpus.codec import count_units, make_codec
from corpus.files import TOKENIZER, checksum, load_cache, read_tokenizer, save_cache
from data import Corpus
from evaluate import evaluate
from harness import checkpoint, files
from harness.flags import check_shape, inherited_args, resolve_args
from train import Run
from utils import UserError

SECONDS = 5  # for one file of some kilobytes
IDS = toys.make_text(400)
CORPUS = Corpus(toys.WORDS, IDS, IDS[:100], IDS[:60], "a digest")
CPU = torch.device("cpu")


class Kind(NamedTuple):
    """A kind of file.

    make: writes a sound one into a folder.
    use: what the script does with it that would be a fault in a damaged one; returns its figures.
    exact: variants of bytes give the same figures, or an error: the file has checksums.
    """

    make: Callable[[Path], Path]
    use: Callable[[Path], Any]
    exact: bool = True


# What a script does with each kind


def run_settings(folder: Path, **more: object) -> Namespace:
    given = toys.settings_of("LSTM", emsize=8, nhid=10) | toys.NO_DROPOUT | {"batch_size": 4, "bptt": 12}
    given |= {"save": str(folder / "m.pt"), "resume": str(folder / "m.pt"), "optimizer": "adam", "lr": 0.01}
    return resolve_args(given | more, {})


def make_state(folder: Path, **more: object) -> Path:
    """The state of a few steps, in the middle of an epoch and of averaging, and its model."""
    run = Run("main.py", run_settings(folder, shuffle=True, **more), CORPUS, CPU)
    run.start_epoch()
    run.start_averaging()
    take_steps(run, 3)
    run.at.history.append(3.0)
    checkpoint.save_model(run, 3.0)
    checkpoint.save_state(run)
    return folder / "m.pt.state"


def take_steps(run: Run, count: int) -> None:
    run.start_epoch()
    for _, (source, target) in zip(range(count), train.train_batches(run), strict=False):
        run.count_step(train.train_step(run, source, target), len(source))


def use_state(path: Path) -> list[Tensor]:
    """The weights two steps after the run has been resumed; the state after them can be saved."""
    state = files.load_state(str(path), "--resume")
    stored = state["args"] | {"save": str(path.parent / "new.pt"), "resume": str(path).removesuffix(".state")}
    args = resolve_args(stored, stored)
    for name, value in vars(run_settings(path.parent)).items():
        # The run of the sound state: another setting gives another run, as a flag would.
        if name not in ("save", "resume", "shuffle"):
            setattr(args, name, value)
    args.shuffle = True
    run = Run("main.py", args, CORPUS, CPU)
    with contextlib.redirect_stdout(io.StringIO()):
        checkpoint.resume(run, state, {})
    take_steps(run, 2)
    checkpoint.save_state(run)
    return [*run.weights.state_dict().values(), *run.mean.weights.state_dict().values()] if run.mean else []


def make_model(folder: Path) -> Path:
    return toys.save_model(folder / "m.pt", tokenizer='{"decoder": null}')


def use_model(path: Path) -> float:
    saved = files.load_model(str(path), "--save")
    check_shape({}, saved["args"], str(path))
    resolve_args(inherited_args(saved["args"]), saved["args"])
    opened = files.to_evaluate(saved, CPU)
    count_units(opened.tokenizer, opened.vocab, IDS.numpy())
    with contextlib.suppress(UserError):
        make_codec(opened.tokenizer, opened.vocab, str(path)).piece(opened.vocab[3])
    with contextlib.redirect_stdout(io.StringIO()):
        train.test(saved, IDS[:60], 10, train.RunLog(None))
    return evaluate(opened.model, opened.criterion, IDS[:60], 10, 1)


STATISTICS = Namespace(data="text", batch_size=4, bptt=5, max_batches=3)


def opened_toy() -> files.Opened:
    args, model, criterion = toys.make_model()
    return files.Opened(model, criterion, toys.WORDS, Namespace(**args), CPU, None)


def make_statistics(folder: Path) -> Path:
    dynamiceval.find_statistics(opened_toy(), str(folder / "m.pt.stats"), CORPUS, STATISTICS)
    return folder / "m.pt.stats"


def use_statistics(path: Path) -> list[Tensor]:
    """They are the same, or made anew; other finite numbers of a file with sound checksums are believed."""
    saved = opened_toy()
    ms = dynamiceval.find_statistics(saved, str(path), CORPUS, STATISTICS)
    moving = dynamiceval.MovingWeights(dynamiceval.weights_of(saved), ms, 5e-5, 2e-3, 2e-5)
    loss, _ = toys.dynamic_loss(saved, moving, IDS[:20], 5)
    assert math.isfinite(loss)
    return ms


def make_cache(folder: Path) -> Path:
    path = folder / ".cache-0.pt"
    save_cache(path, CORPUS._replace(**{split: IDS.short() for split in ("train", "valid", "test")})._asdict())
    return path


def use_cache(path: Path) -> Any:
    """None or a corpus whose words and ids go together; tensors are read, so that a map past the file's end shows."""
    cached = load_cache(path, CORPUS.digest)
    if cached is None:
        return None
    corpus = Corpus(**cached)
    return [[corpus.vocab[i] for i in ids.tolist()] for ids in (corpus.train, corpus.valid, corpus.test)]


def make_tokenizer(folder: Path) -> Path:
    source = folder / "text.txt"
    source.write_text("the cat sat on the mat\nthe dog ate the cat\n" * 20)
    flags = ["--valid_file", source, "--test_file", source, "--level", "subword", "--vocab_size", 280]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert toys.call(prepare, source, *flags, "--out", folder / "corpus") == 0
    return folder / "corpus" / TOKENIZER


def use_tokenizer(path: Path) -> Any:
    text, pieces = read_tokenizer(path.parent)
    vocab = ["<eos>", "<unk>", *(piece for piece in pieces if piece not in ("<eos>", "<unk>"))]
    count_units(text, vocab, torch.arange(len(vocab)).numpy())
    codec = make_codec(text, vocab, str(path))
    encoded = codec.encode("the cat ate the mat").split()
    "".join([codec.piece(piece) for piece in [*encoded, *vocab[:20]]] + [codec.end()])
    return encoded, pieces


KINDS = {
    "model": Kind(make_model, use_model),
    "state": Kind(make_state, use_state),
    "statistics": Kind(make_statistics, use_statistics),
    "cache": Kind(make_cache, use_cache),
    "tokenizer": Kind(make_tokenizer, use_tokenizer, exact=False),
}


# Variants


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bits, bytes, parts of a file: changed, cut, moved, repeated."""
    data, size = bytearray(data), len(data)
    first, last = sorted(rng.sample(range(size + 1), 2))
    other = rng.randrange(size)
    match rng.randrange(9):
        case 0 | 1 | 2:
            for _ in range(rng.choice([1, 1, 2, 5])):
                data[rng.randrange(size)] ^= 1 << rng.randrange(8)
        case 3:
            data[rng.randrange(size)] = rng.randrange(256)
        case 4:
            del data[first:]
        case 5:
            del data[first : min(last, first + rng.choice([1, 4, 64, size]))]
        case 6:
            length = rng.choice([1, 8, 100])
            data[first : first + length], data[other : other + length] = (
                data[other : other + length],
                data[first : first + length],
            )
        case 7:
            data[first : first + 200] = bytes(len(data[first : first + 200]))
        case 8:
            data[first:first] = rng.choice([data[first:last], rng.randbytes(rng.choice([1, 30]))])
    return bytes(data)


def odd_tensors(tensor: Tensor) -> list[Callable[[], Tensor]]:
    """Tensors in the place of one: of another shape, type or layout, not finite, larger than their memory."""
    floats = tensor.float()
    return [
        lambda: tensor.double(), lambda: tensor.half(), lambda: tensor.int(), lambda: tensor.to(torch.complex64),
        lambda: tensor.bool(), lambda: tensor.to(torch.float8_e4m3fn), lambda: floats.to_sparse(),
        lambda: torch.quantize_per_tensor(floats, 0.1, 0, torch.quint8), lambda: tensor.to("meta"),
        lambda: torch.full_like(floats, torch.nan), lambda: torch.full_like(floats, torch.inf),
        lambda: torch.full_like(floats, 3e38), lambda: torch.full_like(tensor, -1) if tensor.is_signed() else tensor,
        lambda: tensor.flatten(), lambda: tensor[None], lambda: tensor.flatten()[:1], lambda: tensor.flatten()[:0],
        lambda: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape), lambda: torch.zeros(1).expand(2**40),
        lambda: torch.nn.Parameter(floats), lambda: tensor.clone(), lambda: torch.zeros_like(tensor),
    ]  # fmt: skip


def laughs() -> list[Any]:
    tree: list[Any] = ["lol"]
    for _ in range(6):
        tree = [tree] * 10
    return tree


def odd_values(json_only: bool) -> list[Any]:
    plain = [None, True, False, 0, 1, -1, 2.5, -1e300, 2**62, 10**30, "", "text", "nan", "\0", "\ud800", [], {}, [[[]]]]
    plain += [math.nan, math.inf, [1, "a"], {"a": 1}, "w" * 10**4, [0] * 10**4]
    if json_only:
        return plain
    return [
        *plain,
        b"bytes",
        set(),
        bytearray(9),
        1j,
        torch.Size([2]),
        torch.float32,
        ...,
        {3: 4},
        {(1,): 2},
        (),
        laughs(),
    ]


def damage_tree(tree: Any, rng: random.Random, json_only: bool = False) -> Any:
    """A copy with one value replaced, removed or added, at a random place."""
    tree = copy.deepcopy(tree)
    node, holder, key = tree, None, None
    while isinstance(node, dict | list | tuple) and len(node) and (holder is None or rng.random() < 0.85):
        if isinstance(node, tuple):  # made a list, which can be changed; torch reads either
            node = holder[key] = list(node)
        holder, key = node, rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        node = holder[key]
    values = odd_values(json_only)
    if isinstance(node, Tensor) and rng.random() < 0.7:
        holder[key] = rng.choice(odd_tensors(node))()
    elif rng.random() < 0.15:
        del holder[key]
    elif rng.random() < 0.1 and isinstance(holder, dict):
        holder[rng.choice(["new", 7, True, None, "model", *[(1, 2)] * (not json_only)])] = rng.choice(values)
    else:
        holder[key] = rng.choice(values)
    return tree


def write_variant(sound: bytes, tree: Any, path: Path, rng: random.Random) -> bool:
    """Writes a variant; returns whether only bytes were damaged."""
    if rng.random() < 0.5:
        path.write_bytes(damage_bytes(sound, rng))
        return True
    damaged = damage_tree(tree, rng, path.name == TOKENIZER)
    if path.name == TOKENIZER:
        path.write_text(json.dumps(damaged))
        return False
    if path.name.startswith(".cache") and rng.random() < 0.8:  # its own checksum too is sound
        with contextlib.suppress(Exception):
            parts = {name: part for name, part in damaged.items() if name != "check"}
            damaged["check"] = checksum(parts | {"vocab": json.loads(parts["vocab"])})
    with contextlib.suppress(AttributeError, TypeError):  # what cannot be pickled; the file is then cut
        torch.save(damaged, path)
    return False


def same(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return all(map(same, a, b))
    return a.equal(b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b


def try_variant(kind: Kind, path: Path, figures: Any, bytes_only: bool) -> tuple[str, str]:
    """How a variant ended: "refused", "passed over", "the same", "others" (figures) or "fault"; and why."""
    began_s = time.monotonic()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            result = kind.use(path)
    except UserError as error:  # or RunError
        end, text = ("refused", str(error)) if error.status in (1, 2) else ("fault", "no status")
    except BaseException as error:  # a panic of tokenizers is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        place = error.__traceback__
        while place and place.tb_next:
            place = place.tb_next
        where = f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}" if place else ""
        end, text = "fault", f"{type(error).__name__} at {where}: {str(error)[:100]}"
    else:
        end, text = "passed over" if result is None else "the same" if same(result, figures) else "others", ""
        if end == "others" and bytes_only and kind.exact:
            end, text = "fault", "other figures, without a word"
    if time.monotonic() - began_s > SECONDS:
        end, text = "fault", f"{time.monotonic() - began_s:.0f} s"
    return end, text


def fuzz(name: str, count: int, first: int = 0) -> tuple[Counter[str], list[str]]:
    """Tries variants of a kind; returns how many ended how, and the faults."""
    kind, ends, faults = KINDS[name], Counter[str](), []
    with tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-") as folder, warnings.catch_warnings(action="ignore"):
        path = kind.make(Path(folder))
        sound, figures = path.read_bytes(), kind.use(path)
        tree = json.loads(sound) if path.name == TOKENIZER else torch.load(path, weights_only=True)
        for i in range(first, first + count):
            rng = random.Random(f"{name} {i}")
            bytes_only = write_variant(sound, tree, path, rng)
            end, text = try_variant(kind, path, figures, bytes_only)
            ends[end] += 1
            if end == "fault":
                faults.append(f"{name} {i}: {text}")
        path.write_bytes(sound)
        assert same(kind.use(path), figures), "the sound file has other figures after the damaged ones"
    return ends, faults


def main() -> int:
    count, names = int(sys.argv[1]) if len(sys.argv) > 1 else 1000, sys.argv[2:] or list(KINDS)
    torch.set_num_threads(1)
    found = 0
    for name in names:
        began_s = time.monotonic()
        ends, faults = fuzz(name, count)
        print(f"{name:10}  {dict(sorted(ends.items()))}  {time.monotonic() - began_s:.0f} s", flush=True)
        for fault in faults[:20]:
            print(f"    {fault}")
        found += len(faults)
    print(f"{found} faults in {count * len(names)} files")
    return int(found > 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
