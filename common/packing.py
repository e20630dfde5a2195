"""One bundle as one zip that runs alone: `python -m common.packing bundles/recorr --output_dir dist`.

The zip unpacks to `recorr/`, the bundle with `common` beside its configs, where its `sys.path` entry finds it. No
config is rewritten: `common` has the same name in both places. Packing the same files gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import common
from common.errors import InputError, RegistrationError
from common.io import atomic_path, check_output_dir

__all__ = ["VENDORED_FILE", "content_hash", "pack_bundle", "packed_files"]

VENDORED_FILE = "common/_vendored.json"
"""In the zip: version and hash of the `common` that it carries."""

_DATE = (2020, 1, 1, 0, 0, 0)  # a zip has a date for each file; any fixed one will do
_MODE = 0o644 << 16

# Of a bundle only what the specification names goes along: runs, caches and a user's own files stay where they are.
_BUNDLE_FOLDERS = ("configs", "docs", "models")
_NEEDED = ("LICENSE", "configs/metadata.json", "configs/inference.json", "models/model.pt")
# A server leaves its own training config behind (MONAI Label), a bundle run its downloaded schema.
_LEFT_OUT = ("__pycache__", "eval", "tests", "monailabel_train.json")


def packed_files(bundle: Path) -> dict[str, Path]:
    """What goes into the zip of a bundle, by the path inside the bundle; sorted.

    Args:
        bundle: its folder.

    Raises:
        InputError: when it is not a bundle, or a file that every bundle has is missing.
    """
    for name in _NEEDED:
        if not (bundle / name).is_file():
            raise InputError(f"{bundle} cannot be packed: it has no {name}")
    folders = [bundle / name for name in _BUNDLE_FOLDERS]
    folders += [path.parent for path in bundle.glob("*/__init__.py") if path.parent.name != "common"]
    found = [bundle / "LICENSE"]
    for folder in folders:
        found += [path for path in folder.rglob("*") if path.is_file() and _wanted(path.relative_to(bundle))]
    files = {path.relative_to(bundle).as_posix(): path for path in found}
    return dict(sorted(files.items() | _common_files().items()))


def _common_files() -> dict[str, Path]:
    root = Path(common.__file__).parent
    return {f"common/{path.relative_to(root).as_posix()}": path for path in root.rglob("*.py")}


def _wanted(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and path.suffix not in (".pyc", ".part") and not any(part in _LEFT_OUT for part in path.parts)


def content_hash(files: Mapping[str, Path]) -> str:
    """SHA-256 over names and contents."""
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def pack_bundle(bundle: Path, output_dir: Path) -> Path:
    """Write `<name>_v<version>.zip`.

    Args:
        bundle: folder of the bundle; its name is the name of the folder that the zip unpacks to.
        output_dir: where the zip goes; made when missing.

    Returns:
        path of the zip.

    Raises:
        InputError: when `bundle` is not a bundle.
        OutputError: when the zip cannot be written.
    """
    bundle = bundle.resolve()
    files = packed_files(bundle)
    try:
        version = json.loads(files["configs/metadata.json"].read_text())["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{bundle} cannot be packed: its configs/metadata.json gives no version") from error
    vendored = {
        "package": "common",
        "version": common.__version__,
        "sha256": content_hash({name: path for name, path in files.items() if name.startswith("common/")}),
    }
    contents = {name: path.read_bytes() for name, path in files.items()}
    contents[VENDORED_FILE] = (json.dumps(vendored, indent=4) + "\n").encode()
    check_output_dir(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    target = output_dir / f"{bundle.name}_v{version}.zip"
    with atomic_path(target) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name in sorted(contents):
            entry = zipfile.ZipInfo(f"{bundle.name}/{name}", _DATE)
            # Stored, not deflated: the weights, nearly all of it, do not shrink, and deflate depends on zlib's version.
            entry.create_system = 3  # Unix, wherever it is packed
            entry.external_attr = _MODE
            archive.writestr(entry, contents[name])
    return target


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m common.packing", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, help="folder of the bundle, for instance bundles/recorr")
    parser.add_argument("--output_dir", type=Path, default=Path("dist"), help="where the zip goes; default: dist")
    options = parser.parse_args(arguments)
    try:
        target = pack_bundle(options.bundle, options.output_dir)
    except RegistrationError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{target}  sha256 {hashlib.sha256(target.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
