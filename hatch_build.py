"""The README as an index of packages shows it, where the files that it links to are not.

The project's address is told by whoever publishes: DRIFT_PEFT_URL, as in the workflow of releases. Links into the
repository then lead to the files of this version there. Without one they are plain text, without images.
"""

import os
import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

PAPER = "https://arxiv.org/abs/2510.15050"
VERSION = re.compile(r'^__version__ = "(.+)"', re.M)
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>(?!https?://)[^)]+)\)")


class Metadata(MetadataHookInterface):
    def update(self, metadata: dict) -> None:
        root, address = Path(self.root), os.environ.get("DRIFT_PEFT_URL", "").rstrip("/")
        readme = root.joinpath("README.md").read_text(encoding="utf-8")
        version = VERSION.search(root.joinpath("drift_peft/__init__.py").read_text(encoding="utf-8"))[1]
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute(readme, address, f"v{version}")}
        metadata["urls"] = {"Paper": PAPER}
        if address:
            metadata["urls"] |= {
                "Repository": address,
                "Issues": f"{address}/issues",
                "Changelog": f"{address}/blob/v{version}/CHANGELOG.md",
            }


def absolute(markdown: str, address: str, tag: str) -> str:
    """Markdown whose links into the repository lead to this tag of it, or are plain text if there is no address."""

    def link(match: re.Match) -> str:
        image, text, target = match["image"], match["text"], match["target"]
        if not address:
            return "" if image else text
        file = f"README.md{target}" if target.startswith("#") else target
        return f"{image}[{text}]({address}/{'raw' if image else 'blob'}/{tag}/{file})"

    return LINK.sub(link, markdown)
