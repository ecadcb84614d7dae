"""Lazy attributes for packages whose imports are heavy (PEP 562), and packages that can be called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

__all__ = ["attach", "callable_module"]


def attach(package: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns ``__getattr__`` and ``__dir__`` for a package.

    Args:
        package: the package's ``__name__``.
        names: public name -> the module that defines it; a name that equals the last part of its module is the module itself.
    """

    def getattr_(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(names[name])
        value = module if names[name].rpartition(".")[2] == name else getattr(module, name)
        setattr(sys.modules[package], name, value)
        return value

    return getattr_, lambda: sorted({*vars(sys.modules[package]), *names})


def callable_module(package: str, home: str, function: str) -> None:
    """Lets a package be called, so that ``wr.compare(...)`` and ``weightroom.compare.prune`` can both exist.

    Args:
        package: the package's ``__name__``.
        home: the module of the function that a call goes to.
        function: its name.
    """

    class CallableModule(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(importlib.import_module(home), function)(*args, **kwargs)

    sys.modules[package].__class__ = CallableModule
