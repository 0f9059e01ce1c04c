"""What the build adds to mkdocs: formulas as MathML, the result files outside docs/, and docstrings as Markdown."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from griffe import Class, Extension, Function
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
API = ROOT / "docs" / "api.md"
RESULTS = "benchmarks/results"
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
PICTURE = re.compile(r'(?<!">)(<img(?![^>]*house)[^>]* src="([^"]+)"[^>]*>)')
PRIMED = re.compile(r"<msup><mi>(\w)</mi><mi>&#x02032;</mi></msup>")
TEST = re.compile(r"<code>((?:tests/)?test_\w+\.py(?:::\w+)?)</code>")


def on_files(files: Files, config: Any) -> Files:
    """The committed results are part of the site, under the path that they have in the repository."""
    for path in sorted((ROOT / RESULTS).glob("*")):
        if path.suffix in (".json", ".csv", ".png"):
            name = f"{RESULTS}/{path.name}"
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A link from docs/ to a result file is one inside the site; one to the folder is its name."""
    up = "../" * page.file.src_uri.count("/")
    markdown = re.sub(rf"\[([^]]*)\]\((?:\.\./)+{RESULTS}/?\)", r"`\1`", markdown)
    return re.sub(rf"\]\((?:\.\./)+({RESULTS}/[\w.-]+)\)", rf"]({up}\1)", markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers set by themselves; names of tests in small print; pictures that open whole."""
    content = PICTURE.sub(r'<a href="\2">\1</a>', content)
    content = TEST.sub(
        lambda m: f'<small class="proof">{m[1].replace("_", "_<wbr>")}</small>', content
    )
    return FORMULA.sub(
        lambda m: _mathml(
            html.unescape(m[2]).strip(), "block" if m[1] == "div" else "inline"
        ),
        content,
    )


def _mathml(formula: str, display: str) -> str:
    """A prime stands high in its own glyph; set as an exponent it is raised twice where no mathematical font is."""
    return PRIMED.sub(
        r'<mi class="primed">\1&#x2032;</mi>', convert(formula, display=display)
    )


class Docstrings(Extension):
    """Doctests become an Examples section, and Sphinx roles become links."""

    LOSS, METHODS = (
        "NoiseConditionedPerceptualLoss",
        ("forward", "errors", "features"),
    )

    def on_function(self, *, func: Function, **_: Any) -> None:
        self._rewrite(func)

    def on_class(self, *, cls: Class, **_: Any) -> None:
        self._rewrite(cls)

    def _rewrite(self, of: Function | Class) -> None:
        if of.docstring is None:
            return
        text, prompt, doctest = of.docstring.value.partition("\n>>> ")
        text = re.sub(r":(?:class|func|meth):`([\w.]+)`", lambda m: self._link(m[1]), text)
        if prompt:
            example = "\n".join(
                f"    {line}" for line in f">>> {doctest}".rstrip().splitlines()
            )
            text = f"{text.rstrip()}\n\nExamples:\n{example}\n"
        of.docstring.value = text

    def _link(self, name: str) -> str:
        """A link to what the API page shows; the bare name of anything else."""
        full = f"ncp_loss.{f'{self.LOSS}.{name}' if name in self.METHODS else name}"
        shown = re.search(
            rf"^::: {'.'.join(full.split('.')[:2])}$", API.read_text(), re.MULTILINE
        )
        return f"[`{name}`][{full}]" if shown else f"`{name}`"
