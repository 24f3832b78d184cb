"""A method's citation: one record, printed by model cards, docs and `repr`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """A publication that a method implements.

    Args:
        title: Full title.
        authors: Surnames in order, as in a bibliography ("Chen et al." is fine for long lists).
        year: Year of publication.
        arxiv: arXiv identifier such as ``"2004.12651"``, without a version.
        venue: Place of publication, such as ``"EMNLP 2020"``.
        link: Address of the abstract page, for a paper without an arXiv entry.
    """

    title: str
    authors: str
    year: int
    arxiv: str | None = None
    venue: str | None = None
    link: str | None = None

    @property
    def url(self) -> str | None:
        """Address of the paper's abstract page, or None if it is not known."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else self.link

    @property
    def bibtex(self) -> str:
        """A BibTeX entry whose key is first author, year and first long word of the title."""
        author = self.authors.split()[0].strip(",").lower()
        word = next((w for w in self.title.split() if len(w) > 3), "paper").strip(":,").lower()
        fields = {"title": self.title, "author": self.authors, "year": str(self.year)}
        if self.venue:
            fields["booktitle"] = self.venue
        if self.arxiv:
            fields |= {"eprint": self.arxiv, "archivePrefix": "arXiv"}
        elif self.link:
            fields["url"] = self.link
        body = ",\n".join(f"  {key} = {{{value}}}" for key, value in fields.items())
        return f"@misc{{{author}{self.year}{word},\n{body}\n}}"
