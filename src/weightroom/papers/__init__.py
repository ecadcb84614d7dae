"""One file per paper: its card and the study that checks its claim.

The package itself can be called: ``wr.papers()`` lists the cards (see ``weightroom.api.papers``).
"""

from weightroom.lazy import callable_module

callable_module(__name__, "weightroom.api", "papers")
