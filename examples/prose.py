"""The prose sentences of a docstring, whichever of the usual styles it is written in (plain, reST, numpydoc, Google)."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

MIN_WORDS, MAX_WORDS = 2, 40

# Sections made of tables, code or lists of names; the text of any other section (Notes, Description, …) is prose.
_SKIPPED_SECTIONS = re.compile(
    r"(other |keyword )?(param(eter)?|arg(ument)?|kwarg|attribute|propert(y|ie)|method|field|return|yield|receive|raise|warn|"
    r"warning|example|reference|usage|output|input|shape|link|author|todo|contents?|option|exception|key|type constraint)s?"
    r"( list| types?)?|see also",
    re.IGNORECASE,
)
_UNDERLINE = re.compile(r"([=\-~^\"'`#*+])\1{2,}\s*$")
_NOT_PROSE = re.compile(
    r">>>|\.\. |:\w[\w \[\],.*]*:(\s|$)|[-*+•|=#@$%]|\d+[.)] |\{"  # doctest, directive, field, bullet, table
    r"|\w+\s*\(.*\)\s*(->.*|=.*)?$|[\w.]+\(.*\) ->|\w+\s*=\s|[\w.*, ]+ : "  # signature, assignment, "name : type"
)
_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|etc|vs|cf|eq|eqs|no|fig|sec|ref|refs|resp|approx|al|incl|dr|st|pp?|vol|ed)|\b[A-Z])\.$", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')]*\s+(?=[\"'(]?[A-Z])")
_FOREIGN = re.compile(r"[\\^{}<>|=]|::|https?:|\.\.\.$|:$|___")
_POINTERS = ("see ", "alias ", "deprecated", "same as ", "refer to ", "read more ", "please see ", "for more ", "for details")
_MARKUP = [
    (re.compile(r":math:`[^`]*`|\$[^$]*\$"), " \\ "),  # the backslash makes `_readable` refuse the sentence
    (re.compile(r"(?::[\w:+-]+:)?`([^`<]+?)\s*<[^>]*>`_*"), r"\1"),  # links and titled roles keep their title
    (re.compile(r":[\w:+-]+:`~(?:[^`]*\.)?([^`.]*)`"), r"\1"),
    (re.compile(r":[\w:+-]+:`!?([^`]*)`"), r"\1"),
    (re.compile(r"\[([^\]]+)\]\((?:[^)]*)\)"), r"\1"),
    (re.compile(r"\s*\[[\w#*]+\]_"), ""),  # footnotes
    (re.compile(r"(\*\*|\*)(\S(?:.*?\S)?)\1"), r"\2"),
    (re.compile(r"`{1,3}([^`]*)`{1,3}_{0,2}"), r"\1"),
]


def sentences(docstring: str) -> list[str]:
    """The sentences in order, the summary first; code, tables, parameter lists and formulas are left out."""
    found: dict[str, None] = {}
    for number, paragraph in enumerate(_paragraphs(inspect.cleandoc(docstring))):
        for pattern, plain in _MARKUP:
            paragraph = pattern.sub(plain, paragraph)
        for text in _split(" ".join(paragraph.split())):
            ends = text.rstrip("\"')").endswith((".", "!", "?"))
            if _readable(text) and (ends or number == 0):  # only a summary may lack its full stop
                found[text] = None
    return list(found)


def _paragraphs(text: str) -> Iterator[str]:
    """Blocks of unindented prose outside the skipped sections."""
    skipping = literal = False
    for block in re.split(r"\n\s*\n", text):
        lines = block.split("\n")
        if len(lines) > 1 and _UNDERLINE.match(lines[1]) and not lines[0].startswith(" "):  # numpydoc, reST heading
            skipping, literal = bool(_SKIPPED_SECTIONS.fullmatch(lines[0].strip())), False
            lines = lines[2:]
        elif google := re.fullmatch(r"([A-Z][\w ]*):\s*", lines[0]):
            skipping = bool(_SKIPPED_SECTIONS.fullmatch(google[1])) and len(lines) > 1
            lines = lines[1:] if skipping else lines
        elif skipping and not lines[0].startswith(" ") and not _in_numpydoc(text):
            skipping = False  # a Google section ends where the indentation does
        if skipping or not lines:
            continue
        if literal and lines[0].startswith(" "):
            continue
        literal = lines[-1].rstrip().endswith("::")
        prose = []
        for line in lines:
            if line.startswith((" ", "\t")) or _NOT_PROSE.match(line) or _UNDERLINE.match(line):
                break
            prose.append(line)
        if prose:
            yield "\n".join(prose)


def _in_numpydoc(text: str) -> bool:
    return re.search(r"^\w[\w ]*\n-{3,}\s*$", text, re.MULTILINE) is not None


def _split(paragraph: str) -> Iterator[str]:
    start = 0
    for end in _SENTENCE_END.finditer(paragraph):
        if not _ABBREVIATION.search(paragraph[start : end.start()]):
            yield paragraph[start : end.start()].strip()
            start = end.end()
    yield paragraph[start:].strip()


def _readable(text: str) -> bool:
    """A sentence of ordinary length, mostly letters, that says more than where to look."""
    if not (MIN_WORDS <= len(text.split()) <= MAX_WORDS and 12 <= len(text) <= 300 and text[0].isupper()):
        return False
    if _FOREIGN.search(text) or text.lower().startswith(_POINTERS):
        return False
    return len(re.findall(r"[^\W\d_]", text)) >= 0.7 * len(text.replace(" ", ""))
