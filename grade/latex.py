r"""Any text as LaTeX that pdfLaTeX, XeLaTeX and LuaLaTeX set: samples hold whatever a model writes.

What every engine has with its own fonts stands as it is. Any other character becomes \othercharacter{it}{its code
point}, which shows the code point until a document that has a font for it says
\newcommand{\othercharacter}[2]{#1}.
"""

from __future__ import annotations

import string
import unicodedata

OTHER = r"\providecommand{\othercharacter}[2]{\texttt{U+#2}\allowbreak}"
"""What a file with such characters starts with."""
LONGEST = 2000
"""Characters of a cell; a page, and so a row, may be 5.7 metres high. The CSV has all of them."""
_BREAK = 20  # characters without a space after which a line may be broken
_WRITTEN = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
    "�": "?",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "…": r"\dots{}",
    "→": r"$\to$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "×": r"$\times$",
    "‖": r"$\|$",
    "·": r"$\cdot$",
    "τ": r"$\tau$",
    "\u00a0": "~",
    "\u00ad": r"\-",
}
# Latin letters and signs that LaTeX knows without a package and in its oldest encoding of fonts.
_PLAIN = (
    frozenset(string.printable)
    .difference(string.whitespace)
    .union(
        "¡¢£¤¥¦§¨©ª¬®¯°²³´µ¶¸¹º¼½¾¿ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜÝßàáâãäåæçèéêëìíîïñòóôõö÷øùúûüýÿĀāĂăĆćĈĉĊċČčĎďĒēĔĕĖėĚěĜĝĞğĠġĢģĤĥ"
        "ĨĩĪīĬĭİıĴĵĶķĹĺĻļĽľŁłŃńŅņŇňŌōŎŏŐőŒœŔŕŖŗŘřŚśŜŝŞşŠšŢţŤťŨũŪūŬŭŮůŰűŴŵŶŷŸŹźŻżŽž‘’“”—†‡•€™"
    )
)


def latex(text: str) -> str:
    """`text` with everything that means something to LaTeX, or nothing to it, written out."""
    if len(text) > LONGEST:
        text = text[:LONGEST] + " …"
    written, together, before = [], 0, ""
    for character in text:
        if character.isspace() and character != "\u00a0":
            written.append(" ")
            together = 0
            continue
        if together >= _BREAK:
            written.append(r"\allowbreak{}")
            together, before = 0, ""
        # Two of these in a row would be a dash, a closing quote or a Spanish mark of another look.
        written.append("{}" * (character in "-',<>" and character == before) + _character(character))
        together, before = together + 1, character
    return "".join(written)


def _character(character: str) -> str:
    if character in _WRITTEN:
        return _WRITTEN[character]
    if character in _PLAIN:
        return character
    # Controls, halves of surrogate pairs and marks of direction are not even handed on.
    shown = "" if unicodedata.category(character).startswith("C") else character
    return rf"\othercharacter{{{shown}}}{{{ord(character):04X}}}"
