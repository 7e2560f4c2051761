"""A digest of the extension's sources; alone here, since the build runs this file without the package."""

import hashlib
from pathlib import Path


def source_digest(csrc: Path) -> str:
    """By which a source tree knows an extension that is its own: names and contents of all files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in csrc.rglob("*") if path.is_file()):
        digest.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
