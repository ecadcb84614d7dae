"""A paper's card."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from weightroom.compare.base import Method

__all__ = ["Paper"]


@dataclass(frozen=True)
class Paper:
    """What a paper says, in our words, and what of it lives here.

    Args:
        key: its fixed name on the command line.
        title: full title.
        authors: "First Last, First Last".
        year: of the venue, or of the preprint.
        venue: where it appeared ("ICLR", "arXiv").
        summary: one sentence: what the method does, for whom.
        claim: the central claim, in the paper's sense.
        limits: when not to reach for it, what did not hold here and what we think the reason is; where paper and released code
            differ and which one the part follows.
        family: the comparison that it belongs to ("optimizer", "loss", "prune", "adapt", ...).
        parts: the public objects that implement it.
        number: the number of its specification sheet; None for none.
        arxiv: identifier, "2310.05898".
        methods: name -> ``Method``: what it adds to the arms of its family.
        also: family -> name -> ``Method``: what it adds to the arms of further families.
        code: where the authors' code is, as "owner/name" on GitHub.
        real: the folders under ``WEIGHTROOM_DATA`` that its study at scale "real" reads; empty where it has no study of its own
            at that scale, which then is as "small".
    """

    key: str
    title: str
    authors: str
    year: int
    venue: str
    summary: str
    claim: str
    limits: str
    family: str
    parts: tuple[Any, ...]
    number: int | None = None
    arxiv: str | None = None
    methods: Mapping[str, Method] = field(default_factory=dict)
    also: Mapping[str, Mapping[str, Method]] = field(default_factory=dict)
    code: str | None = None
    real: tuple[str, ...] = ()

    def methods_of(self, family: str) -> dict[str, Method]:
        """What it adds to the arms of ``family``."""
        return {**(self.methods if family == self.family else {}), **self.also.get(family, {})}

    @property
    def bibtex(self) -> str:
        """The BibTeX entry."""
        people = [name.strip() for name in self.authors.split(",")]
        plain = unicodedata.normalize("NFKD", people[0].split()[-1]).encode("ascii", "ignore").decode().lower()
        word = next((w.lower() for w in re.findall(r"[A-Za-z]+", self.title) if len(w) > 3), "paper")
        fields = {"title": f"{{{self.title}}}", "author": " and ".join(people), "year": str(self.year)}
        if self.venue.lower() == "arxiv":
            kind, fields["journal"] = "article", f"arXiv preprint arXiv:{self.arxiv}"
        else:
            kind, fields["booktitle"] = "inproceedings", self.venue
        if self.arxiv:
            fields |= {"eprint": self.arxiv, "archiveprefix": "arXiv"}
        body = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
        return f"@{kind}{{{plain}{self.year}{word},\n{body}\n}}"

    def names(self) -> list[str]:
        """Import paths of the parts, as a user writes them."""
        return [f"{part.__module__.rpartition('.')[0]}.{part.__qualname__}" for part in self.parts]
