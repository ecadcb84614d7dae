"""One file per family of methods: which arms a comparison has and what the user must bring.

The package itself can be called: ``wr.compare("prune", task="digits")`` (see ``weightroom.api.compare``).
"""

from weightroom.lazy import callable_module

__all__ = ["FAMILIES"]

#: Families of methods that can be compared; each is a module of this package with a ``FAMILY``.
FAMILIES = ("prune", "loss", "optimizer", "adapt", "distill", "robust", "patch", "merge")

callable_module(__name__, "weightroom.api", "compare")
