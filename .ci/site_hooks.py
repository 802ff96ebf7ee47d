"""What MkDocs does for this site besides its plugins (`hooks` in mkdocs.yml).

- Pages that lie outside of docs/ (changelog, contributing, ...) become pages of the site, and so do the notebook and
  what the parsers of the commands know.
- Links that lead out of docs/ become links to these pages, or plain text where the site has nothing to show.
- Fences of the language `math` become MathML, which browsers draw without any script.
- Names that docstrings write as [`Name`] become links to the reference.
"""

import json
import posixpath
import re
import sys
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(Path(__file__).parent))

from commands_page import commands_page  # noqa: E402

OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "CODE_OF_CONDUCT.md": "code_of_conduct.md",
    "SECURITY.md": "security.md",
    "examples/measure_train_picture.ipynb": "guide/notebook.md",
    "peft_moice/cli": "commands.md",
}
"""What the repository holds, and the pages that it is on the site."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")
INLINE_MATH = re.compile(r"(?<![`$\w])\$([^$\n]+)\$(?![`$\w])")
ENTRY = re.compile(r"^::: (\S+)$", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    fence = {"name": "math", "class": "math", "format": _math}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in OUTSIDE.items():
        if page not in files.src_uris:
            files.append(File.generated(config, page, content=_page_of(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    folder = posixpath.dirname(page.file.src_uri)

    def replace(link: re.Match[str]) -> str:
        image, text, target, anchor = link.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        if not path.startswith("../") and (path in files.src_uris or path not in OUTSIDE):
            return link.group()
        path = OUTSIDE.get(path.removeprefix("../"))
        if image or path is None:
            return text
        return f"[{text}]({posixpath.relpath(path, folder or '.')}{anchor or ''})"

    markdown = LINK.sub(replace, markdown)
    if "```math" in markdown:
        markdown = INLINE_MATH.sub(lambda formula: f"<span>{convert(formula[1])}</span>", markdown)
    return markdown


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    pages = (ROOT / "docs" / "reference").glob("*.md")
    entries = [entry for page in pages for entry in ENTRY.findall(page.read_text(encoding="utf-8"))]
    known = {entry.rpartition(".")[2]: entry for entry in entries}

    def replace(name: re.Match[str]) -> str:
        code = f"<code>{name[1]}</code>"
        entry = known.get(name[1].rpartition(".")[2])
        return code if entry is None else f'<autoref optional identifier="{entry}">{code}</autoref>'

    return re.sub(r"\[<code>([\w.]+)</code>\]", replace, html)


def _math(source: str, *args: object, **kwargs: object) -> str:
    return convert(source, display="block")


def _page_of(source: Path) -> str:
    if source.is_dir():
        return commands_page()
    text = source.read_text(encoding="utf-8")
    return _notebook_page(text) if source.suffix == ".ipynb" else text.replace("](docs/", "](")


def _notebook_page(notebook: str) -> str:
    """A notebook as Markdown, with the outputs that it was saved with."""
    parts = []
    for cell in json.loads(notebook)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![Picture](data:image/png;base64,{''.join(data['image/png']).replace(chr(10), '')})")
            elif text := "".join(output.get("text", data.get("text/plain", ""))):
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts)
