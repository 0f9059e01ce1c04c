"""Apply the edits of a recipe page to a checkout of the trainer, with `git apply`.

    python docs/apply_recipe.py docs/recipes/kohya.md ~/sd-scripts
    python docs/apply_recipe.py docs/recipes/kohya.md ~/sd-scripts --reverse

The edits are the page's ```diff blocks. Further arguments are those of `git apply`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

BLOCK = re.compile(r'^```diff title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def diffs(page: Path) -> list[tuple[str, str]]:
    """Title (repository and commit) and text of each diff of the page, in order."""
    return BLOCK.findall(page.read_text())


def apply(page: Path, checkout: Path, *options: str) -> int:
    """All or nothing: a page that no longer fits the checkout changes nothing in it."""
    patch = "".join(text for _, text in diffs(page))
    command = ["git", "apply", "--verbose", *options, "-"]
    return subprocess.run(command, cwd=checkout, input=patch, text=True).returncode


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(apply(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]))
