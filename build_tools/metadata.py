"""What pyproject.toml calls dynamic: the version, and a README whose links work on a package index."""

from __future__ import annotations

import os
import re
from pathlib import Path

import backend

from tolaria._version import VERSION
from tolaria.errors import BuildError


def version(local: str | None = None) -> str:
    """The version of the package, with a local part if there is one (``0.1.0+torch2.13.cpu``).

    Raises:
        BuildError: that is no local version.
    """
    from packaging.version import InvalidVersion, Version  # setuptools brings it along

    try:
        return str(Version(f"{VERSION}+{local}" if local else VERSION))
    except InvalidVersion:
        raise BuildError(
            f"TOLARIA_LOCAL_VERSION: expected letters, digits and dots, as in torch2.13.cpu, got {local!r}"
        ) from None


def absolute_links(text: str, source: str) -> str:
    """Markdown whose links to files of the repository lead to its host, pictures to the picture itself."""

    def absolute(found: re.Match[str]) -> str:
        kind = "raw" if found["picture"] else "blob"
        return f"{found['picture']}[{found['text']}]({source}/{kind}/main/{found['path']})"

    return re.sub(r"(?P<picture>!?)\[(?P<text>[^]]*)\]\((?!\w+:|#)(?P<path>[^)]+)\)", absolute, text)


def dynamic(root: Path) -> dict[str, object]:
    """The arguments of ``setup()``."""
    readme = (root / "README.md").read_text(encoding="utf-8")
    source = backend.project()["urls"]["Source"]
    return {
        "version": version(os.environ.get("TOLARIA_LOCAL_VERSION")),
        "long_description": absolute_links(readme, source),
        "long_description_content_type": "text/markdown",
    }
