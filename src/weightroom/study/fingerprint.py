"""A fingerprint of what decides the outcome of a trial: code, arguments, data, seed, scale, versions.

Code is followed, not files: a function counts as its bytecode, its defaults, what its closure holds, and the functions and
classes of weightroom and of the user that it names, and theirs in turn. So an edit to a method makes new trials of the arms
that use it and of no others, while a moved line or a new comment changes nothing. Third-party code counts by name; the
versions of what matters most are part of every trial.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import importlib
import inspect
import os
import pickle
import platform
import sys
import sysconfig
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import weightroom

__all__ = ["fingerprint", "versions"]

_FOREIGN = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
#: The machinery of studies decides how trials are run, not what they give.
_MACHINERY = ("weightroom.study", "weightroom.errors", "weightroom.lazy", "weightroom.api")


@functools.cache
def versions() -> dict[str, str]:
    """Versions that may decide an outcome."""
    return {
        "weightroom": weightroom.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def fingerprint(*things: Any, closures: bool = True, memo: dict[int, tuple[Any, bytes]] | None = None) -> str:
    """Returns 32 hexadecimal digits that change when one of ``things`` changes in what it does.

    Args:
        *things: values, tensors, data sets, models, functions, classes.
        closures: also what the closures of functions hold.
        memo: keeps the digests of large data between calls.
    """
    return _Digest(closures, {} if memo is None else memo).of(things).hex()


class _Digest:
    def __init__(self, closures: bool, memo: dict[int, tuple[Any, bytes]]) -> None:
        self.closures, self.memo = closures, memo
        self.seen: dict[int, tuple[Any, int]] = {}

    def of(self, thing: Any) -> bytes:
        if thing is None or isinstance(thing, bool | int | float | complex | str | bytes):
            return _hash(type(thing).__name__.encode(), repr(thing).encode())
        if isinstance(thing, torch.Tensor | np.ndarray):
            return self._array(thing)
        if id(thing) in self.seen:
            return _hash(b"again", str(self.seen[id(thing)][1]).encode())
        self.seen[id(thing)] = (thing, len(self.seen))
        return self._compound(thing)

    def _compound(self, thing: Any) -> bytes:
        if isinstance(thing, enum.Enum):
            return _hash(b"enum", repr(thing).encode())
        if isinstance(thing, Path):
            return _hash(b"path", str(thing).encode())
        if isinstance(thing, Mapping):
            pairs = [(self.of(k), self.of(v)) for k, v in thing.items()]
            return _hash(b"map", *(x for pair in pairs for x in pair))
        if isinstance(thing, set | frozenset):
            return _hash(b"set", *sorted(self.of(x) for x in thing))
        if isinstance(thing, list | tuple | range):
            return _hash(b"list", *(self.of(x) for x in thing))
        if isinstance(thing, functools.partial):
            return _hash(b"partial", self.of(thing.func), self.of(thing.args), self.of(thing.keywords))
        if isinstance(thing, types.MethodType):
            return _hash(b"method", self.of(thing.__self__), self.of(thing.__func__))
        if isinstance(thing, types.FunctionType):
            return self._function(thing)
        if isinstance(thing, types.CodeType):
            return self._code(thing)
        if isinstance(thing, type):
            return self._class(thing)
        if isinstance(
            thing, types.ModuleType | types.BuiltinFunctionType | types.MethodDescriptorType | types.WrapperDescriptorType
        ):
            return _hash(b"name", getattr(thing, "__module__", "") or "", thing.__name__)
        if isinstance(thing, torch.Generator):
            return _hash(b"generator", thing.get_state().numpy().tobytes())
        if isinstance(thing, torch.nn.Module):
            plain = {k: v for k, v in vars(thing).items() if not k.startswith("_")}
            return _hash(
                b"module",
                self.of(type(thing)),
                self.of(dict(thing.state_dict())),
                self.of(plain),
                self.of(dict(thing.named_children())),
            )
        if hasattr(thing, "__dict__"):
            return _hash(b"object", self.of(type(thing)), self.of(vars(thing)))
        return _hash(b"pickle", self.of(type(thing)), pickle.dumps(thing))

    def _array(self, thing: torch.Tensor | np.ndarray) -> bytes:
        if id(thing) not in self.memo:
            head = f"{type(thing).__name__} {thing.dtype} {tuple(thing.shape)}".encode()
            if isinstance(thing, torch.Tensor):
                flat = thing.detach().cpu().contiguous().reshape(-1)
                body: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
            elif thing.dtype == object:
                body = pickle.dumps(thing.tolist())
            else:
                body = np.ascontiguousarray(thing).reshape(-1).view(np.uint8)
            self.memo[id(thing)] = (thing, _hash(head, body))
        return self.memo[id(thing)][1]

    def _function(self, function: types.FunctionType) -> bytes:
        if _foreign(function.__module__):
            return _hash(b"function", function.__module__, function.__qualname__)
        parts = [self._code(function.__code__), self.of(function.__defaults__), self.of(function.__kwdefaults__)]
        if self.closures:
            parts += [self.of(_content(cell)) for cell in function.__closure__ or ()]
        wrapped = getattr(function, "__wrapped__", None)
        named = _named(function.__code__, function.__globals__)
        return _hash(b"function", *parts, self.of(wrapped), *(self.of(thing) for thing in named))

    def _code(self, code: types.CodeType) -> bytes:
        documented = not code.co_name.startswith("<") and code.co_consts and isinstance(code.co_consts[0], str)
        consts = code.co_consts[1:] if documented else code.co_consts
        return _hash(b"code", code.co_code, *(self.of(c) for c in consts), " ".join(code.co_names), " ".join(code.co_varnames))

    def _class(self, cls: type) -> bytes:
        name = f"{cls.__module__}.{cls.__qualname__}"
        if _foreign(cls.__module__):
            return _hash(b"class", name)
        members = {
            k: v
            for k, v in vars(cls).items()
            if k
            not in (
                "__doc__",
                "__module__",
                "__dict__",
                "__weakref__",
                "__annotations__",
                "__orig_bases__",
                "__parameters__",
                "__slotnames__",
            )
        }
        members = {k: _unwrap(v) for k, v in members.items() if not k.startswith("_abc_") and not k.startswith("__dataclass")}
        return _hash(b"class", cls.__qualname__, *(self.of(base) for base in cls.__bases__), self.of(members))


def _named(code: types.CodeType, scope: Mapping[str, Any]) -> Iterable[Any]:
    names = _names(code)
    found: dict[str, Any] = {}
    for name in names:
        thing = scope.get(name, sys.modules.get(name) if name.startswith("weightroom.") else None)
        if name.startswith("weightroom.") and thing is None:
            thing = importlib.import_module(name)
        if isinstance(thing, types.ModuleType) and not _foreign(thing.__name__):
            found |= {f"{name}.{n}": getattr(thing, n) for n in names if n in vars(thing) or n in getattr(thing, "__all__", ())}
        else:
            found[name] = thing
    ours = types.FunctionType | type | functools.partial
    return [
        v
        for _, v in sorted(found.items())
        if isinstance(v, ours | bool | int | float | str | tuple | list | dict | torch.Tensor | np.ndarray)
    ]


def _names(code: types.CodeType) -> set[str]:
    inner = (_names(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*inner)


@functools.cache
def _foreign(module: str | None) -> bool:
    if module is None:
        return True
    if module.startswith(_MACHINERY):
        return True
    if module.partition(".")[0] == "weightroom" or module == "__main__":
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return module.partition(".")[0] in sys.stdlib_module_names
    return os.path.realpath(file).startswith(_FOREIGN) or file.startswith(_FOREIGN)


def _unwrap(member: Any) -> Any:
    if isinstance(member, staticmethod | classmethod):
        return member.__func__
    if isinstance(member, property):
        return (member.fget, member.fset)
    if isinstance(member, functools.cached_property):
        return member.func
    if inspect.isgetsetdescriptor(member) or inspect.ismemberdescriptor(member):
        return None
    return member


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _hash(*parts: Any) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()
