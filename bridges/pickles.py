"""Pickles read without running anything of them.

A pickle is a program for a small stack machine. Python's own machine imports whatever the program names and calls it.
The machine here has no import and no call. Numbers, text, lists and dicts become what they are. Each class or function
that the pickle names becomes a `Global`, and what would be made or called becomes a `Bag` of the parts that were given
for it. A few functions that are known, those that make tensors, have a stand-in of ours.

Memory follows the length of the file: no instruction allocates more than the bytes that come with it, or its items are
counted as steps, of which there is a limit.
"""

import pickletools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

MOST_STEPS = 5 * 10**6  # of a pickle: a vocabulary of a million words takes four million
MOST_BITS = 128  # of a whole number: torch's magic number has 77
PLAIN = (str, int, float, bytes, type(None))  # what a dict's key may be: the hash of deeply nested tuples overflows


class DamagedError(Exception):
    """A pickle that is cut, or no pickle."""


@dataclass(frozen=True)  # no tuple, which a list of parts could be taken for
class Global:
    """The name of a class or function."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Bag:
    """Stands for an object of a class that is not known, or for the result of a call that was not made.

    Attributes:
        of: the name of the class or function; called: whether the pickle calls it (a class can be called, too).
        args: the arguments of that call.
        state: the attributes of the object.
        entries, items: what the object holds if it is a kind of dict or list.
    """

    __slots__ = ("args", "called", "entries", "items", "of", "state")

    def __init__(self, of: Any, args: Any, called: bool) -> None:
        self.of: str = of.of if isinstance(of, Bag) else str(of) if isinstance(of, Global) else type(of).__name__
        self.args, self.called = args, called
        self.state: dict[Any, Any] = {}
        self.entries: dict[Any, Any] = {}
        self.items: list[Any] = []

    def build(self, state: Any) -> None:
        """Takes attributes: a dict, or a dict and a dict of slots; anything else is kept under the name `state`."""
        for part in state if isinstance(state, tuple) and len(state) == 2 else (state,):
            if isinstance(part, dict):
                self.state.update(part)
            elif part is not None:
                self.state["state"] = part


def make_dict(*args: Any) -> dict[Any, Any]:
    """The stand-in of OrderedDict and Counter: of nothing, of a dict, or of a list of pairs."""
    if args and isinstance(args[0], dict):
        return args[0]
    found: dict[Any, Any] = {}
    for pair in args[0] if args and isinstance(args[0], list | tuple) else ():
        if isinstance(pair, list | tuple) and len(pair) == 2:
            set_items(found, pair)
    return found


def make_defaultdict(*args: Any) -> dict[Any, Any]:
    return {}


def make_instance(kind: Any, *args: Any) -> Bag:
    """The stand-in of what protocols 0 and 1 make an object with."""
    return Bag(kind, args, called=False)


KNOWN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": make_dict,
    "collections.Counter": make_dict,
    "collections.defaultdict": make_defaultdict,
    "copy_reg._reconstructor": make_instance,
    "copyreg._reconstructor": make_instance,
    "copy_reg.__newobj__": make_instance,
    "copyreg.__newobj__": make_instance,
}


def set_items(target: Any, flat: Iterable[Any]) -> None:
    """Puts keys and values, which take turns in `flat`, into a dict or bag; keys that are not plain are left out."""
    entries = target.entries if isinstance(target, Bag) else target
    if not isinstance(entries, dict):
        raise DamagedError("items for what is no dict")
    turns = iter(flat)
    entries.update((key, value) for key, value in zip(turns, turns, strict=True) if isinstance(key, PLAIN))


def extend(target: Any, values: list[Any]) -> None:
    items = target.items if isinstance(target, Bag) else target
    if not isinstance(items, list):
        raise DamagedError("items for what is no list")
    items.extend(values)


def decode_python2(text: str) -> str:
    """A string of Python 2, whose bytes come as latin-1: as the UTF-8 that it is in practice."""
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text


class Machine:
    """The stack machine.

    A method `do_...` is an instruction of that name in `pickletools`.

    Args:
        known: stand-ins by the names of the functions, beside `KNOWN`.
        load: makes an object of a persistent id, which is how torch refers to storages.
    """

    def __init__(self, known: dict[str, Callable[..., Any]], load: Callable[[Any], Any]) -> None:
        self.known, self.load = {**KNOWN, **known}, load
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}
        self.steps = 0

    def count(self, *copied: Any) -> None:
        """Counts a step, and the items of what it copies.

        Raises:
            DamagedError: there are too many.
        """
        self.steps += 1 + sum(len(part) for part in copied if isinstance(part, list | tuple | dict))
        if self.steps > MOST_STEPS:
            raise DamagedError("more instructions than a model has")

    def run(self, file: Any) -> Any:
        """The object of the next pickle in a file, which is read up to the pickle's end and no further."""
        for opcode, argument, _ in pickletools.genops(file):
            self.count()
            self.step(opcode.name, argument)
        return self.stack.pop()

    def step(self, name: str, argument: Any) -> None:
        if name in VALUES:
            if isinstance(argument, int) and argument.bit_length() > MOST_BITS:
                raise DamagedError("a number without end")
            self.stack.append(argument)
        elif name in STRINGS:
            self.stack.append(decode_python2(argument))
        elif name in FIXED:
            self.stack.append(FIXED[name]())
        elif name in TUPLES:
            self.stack[len(self.stack) - TUPLES[name] :] = [self.top(TUPLES[name])]
        elif name in MEMO:
            self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]
        elif name in RECALL:
            self.stack.append(self.memo[argument])
        elif name not in IGNORED:
            method = getattr(self, f"do_{name.lower()}", None)
            if method is None:
                raise DamagedError(f"the instruction {name}")
            method(argument) if name in WITH_ARGUMENT else method()

    def top(self, count: int) -> tuple[Any, ...]:
        if len(self.stack) < count:
            raise DamagedError("an empty stack")
        return tuple(self.stack[-count:])

    def to_mark(self) -> list[Any]:
        """Takes everything above the last mark."""
        above, self.stack = self.stack, self.marked.pop()
        return above

    def do_mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def do_pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.to_mark()

    def do_pop_mark(self) -> None:
        self.to_mark()

    def do_dup(self) -> None:
        self.stack.append(self.stack[-1])

    def do_tuple(self) -> None:
        values = self.to_mark()
        self.stack.append(tuple(values))

    do_frozenset = do_tuple

    def do_list(self) -> None:
        values = self.to_mark()
        self.stack.append(values)

    def do_dict(self) -> None:
        values, found = self.to_mark(), dict[Any, Any]()
        set_items(found, values)
        self.stack.append(found)

    def do_append(self) -> None:
        value = self.stack.pop()
        extend(self.stack[-1], [value])

    def do_appends(self) -> None:
        values = self.to_mark()
        extend(self.stack[-1], values)

    do_additems = do_appends

    def do_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        set_items(self.stack[-1], [key, value])

    def do_setitems(self) -> None:
        values = self.to_mark()
        set_items(self.stack[-1], values)

    def do_global(self, names: str) -> None:
        module, _, name = names.partition(" ")
        self.stack.append(Global(module, name))

    def do_stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise DamagedError("a class without a name")
        self.stack.append(Global(module, name))

    def make(self, called: bool) -> None:
        """Replaces a class or function and its arguments by what our stand-in makes of them, or by a bag."""
        args, function = self.stack.pop(), self.stack.pop()
        stand_in = self.known.get(str(function)) if isinstance(function, Global) else None
        if stand_in and isinstance(args, tuple):
            self.count(args, *args)
            self.stack.append(stand_in(*args))
        else:
            self.stack.append(Bag(function, args, called))

    def do_reduce(self) -> None:
        self.make(called=True)

    def do_newobj(self) -> None:
        self.make(called=False)

    def do_newobj_ex(self) -> None:
        self.stack.pop()  # arguments by name
        self.make(called=False)

    def do_obj(self) -> None:
        kind, *args = self.to_mark()
        self.stack.append(Bag(kind, tuple(args), called=False))

    def do_inst(self, names: str) -> None:
        module, _, name = names.partition(" ")
        args = self.to_mark()
        self.stack.append(Bag(Global(module, name), tuple(args), called=False))

    def do_build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Bag):
            self.count(state, *(state if isinstance(state, tuple) else ()))
            self.stack[-1].build(state)

    def do_persid(self, name: str) -> None:
        self.stack.append(self.load(name))

    def do_binpersid(self) -> None:
        self.stack.append(self.load(self.stack.pop()))


VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
STRINGS = {"STRING", "BINSTRING", "SHORT_BINSTRING"}  # of Python 2
FIXED: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,  # its members may have no hash here
}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
MEMO = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
RECALL = {"GET", "BINGET", "LONG_BINGET"}
IGNORED = {"PROTO", "FRAME", "STOP"}
WITH_ARGUMENT = {"GLOBAL", "INST", "PERSID"}


def read_pickle(file: Any, known: dict[str, Callable[..., Any]], load: Callable[[Any], Any]) -> Any:
    """The object of the next pickle in a file; see `Machine`.

    Raises:
        DamagedError: it is cut, or no pickle, or one that no program writes.
    """
    try:
        return Machine(known, load).run(file)
    except MemoryError:
        raise
    except Exception as error:  # whatever a wrong program makes the machine do
        raise DamagedError(str(error)) from None
