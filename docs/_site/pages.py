"""A hook of MkDocs: brings pages outside of docs/ into the site, and makes the page of the modules.

A link such as `../benchmarks/README.md` works where the repository is browsed. In the site that page, and whatever it
links to, lies under its path in the repository, and links are changed to lead there. The README is the first page.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[#)])")
FENCE = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages outside of docs/ that pages link to, and those that these link to."""
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    pages = [file for file in files.documentation_pages() if not file.inclusion.is_excluded()]
    while pages:
        page = pages.pop()
        for target in LINK.findall(FENCE.sub("", page.content_string)):
            path = _path(_source(page.src_uri), target)
            is_known = path == "README.md" or path.startswith(("docs/", "../")) or files.get_file_from_path(path)
            if is_known or not (ROOT / path).is_file():
                continue
            file = File.generated(config, path, abs_src_path=str(ROOT / path), inclusion=InclusionLevel.INCLUDED)
            files.append(file)
            if file.is_documentation_page():
                pages.append(file)
    files.append(File.generated(config, "modules.md", content=_modules()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Changes the links of a page to where their targets lie in the site."""
    source, here = _source(page.file.src_uri), posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        path = _path(source, match[1])
        return posixpath.relpath("index.md" if path == "README.md" else path.removeprefix("docs/"), here or ".")

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(moved, part) for part in parts)


def _source(uri: str) -> str:
    """The path in the repository of what lies at `uri` in the site."""
    if uri == "index.md":
        return "README.md"
    return f"docs/{uri}" if (ROOT / "docs" / uri).exists() else uri


def _path(source: str, target: str) -> str:
    """The path in the repository that the link `target` leads to in the file `source`."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def _modules() -> str:
    """A page with the docstring of every module of the package."""
    paths = sorted(path.relative_to(ROOT).with_suffix("") for path in (ROOT / "lodo").rglob("*.py"))
    names = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    options = "    options: {members: false, show_symbol_type_heading: false, show_symbol_type_toc: false}\n"
    entries = [f"::: {name}\n{options}" for name in sorted(names)]
    return "\n".join(["# The modules\n", "What each module of the package says of itself.\n", *entries])
