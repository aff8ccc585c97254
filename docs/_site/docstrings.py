"""An extension of Griffe: makes Markdown of docstrings, which are written to be read in a terminal too.

- Blocks under `.. math::` become formulas.
- `<g, m>` is an inner product and no tag.
- Arguments that share an entry, `a, b: ...`, get one each, so that names which the signature lacks are still found.
- Names of this package in backticks become links where there is something to link to.
"""

import re
from textwrap import dedent, indent
from typing import Any

from griffe import Extension, Object

SECTION = re.compile(r"^(Args|Returns|Raises):\n", re.MULTILINE)
CODE = re.compile(r"^ {4}.*$", re.MULTILINE)
MATH = re.compile(r"^( *)\.\. math::\n((?:\1 +\S.*\n?|\s*\n)+)", re.MULTILINE)
PRODUCT = re.compile(r"<([^<>\n]+, [^<>\n]+)>")
SHARED = re.compile(r"^ {4}(\w+(?:, \w+)+)(: (?:.*\n(?: {5}.*(?:\n|\Z))*|.*\Z))", re.MULTILINE)
RAISES_AS = re.compile(r"^Raises:\n {4}As ", re.MULTILINE)
NAME = re.compile(r"`(lodo(?:\.\w+)+)`")


class Docstrings(Extension):
    """Changes every docstring as it is loaded, before it is parsed."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if not obj.is_alias and obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """A docstring as Markdown, with its sections in Google's style."""
    text = RAISES_AS.sub("Raises as ", text)
    text = PRODUCT.sub("\N{MATHEMATICAL LEFT ANGLE BRACKET}\\1\N{MATHEMATICAL RIGHT ANGLE BRACKET}", text)
    text = MATH.sub(_formula, text)
    found = SECTION.search(text)
    begin = found.start() if found else len(text)
    return _prose(text[:begin]) + NAME.sub(_link, SHARED.sub(_apart, text[begin:]))


def _formula(match: re.Match[str]) -> str:
    body = f"\\[\n\\begin{{aligned}}\n{dedent(match[2]).strip()}\n\\end{{aligned}}\n\\]"
    return indent(body, match[1]) + "\n\n"


def _apart(match: re.Match[str]) -> str:
    text = match[2] if match[2].endswith("\n") else match[2] + "\n"
    return "".join(f"    {name}{text}" for name in match[1].split(", "))


def _prose(text: str) -> str:
    """Links the names in all but the indented lines, which are code."""
    parts = re.split(f"({CODE.pattern})", text, flags=re.MULTILINE)
    return "".join(part if CODE.fullmatch(part) else NAME.sub(_link, part) for part in parts)


def _link(match: re.Match[str]) -> str:
    return f'<autoref optional identifier="{match[1]}"><code>{match[1]}</code></autoref>'
