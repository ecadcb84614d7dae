"""Built-in tasks: ``weightroom.tasks.digits()`` and its like; ``load`` finds one by name or in a user's file.

The package itself can be called: ``wr.tasks()`` lists them (see ``weightroom.api.tasks``).
"""

from weightroom.lazy import attach, callable_module

__all__ = ["BUILT_IN", "breast_cancer", "cifar10", "diabetes", "digits", "load", "mnist", "retina", "vessels", "wine"]

_HOME = {
    "BUILT_IN": "find", "load": "find", "breast_cancer": "classify", "cifar10": "classify", "diabetes": "classify", "digits": "classify",
    "mnist": "classify", "wine": "classify", "retina": "segment", "vessels": "segment",
}  # fmt: skip
__getattr__, __dir__ = attach(__name__, {name: f"{__name__}.{home}" for name, home in _HOME.items()})
callable_module(__name__, "weightroom.api", "tasks")
