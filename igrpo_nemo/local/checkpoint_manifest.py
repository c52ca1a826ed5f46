"""The manifest of a checkpoint folder: whether its files are those that were written.

    seal:         every file synced, then manifest.json with sizes and SHA-256, last of all
    find_damage:  what no longer matches, by name

The manifest covers itself, so a folder that was torn anywhere is found out.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from igrpo_nemo.files.atomic import fsync_file, fsync_folder

MANIFEST = "manifest.json"


def find_damage(path: Path, *, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint folder, naming the file, or None if it is intact.

    With `contents` every file is read once and its SHA-256 compared with the manifest; without,
    the manifest itself, names and sizes are looked at.
    """
    try:
        files = _read_manifest(path)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror})"
    except ValueError:
        return f"{MANIFEST} does not match its checksum"
    for name, entry in files.items():
        try:
            size = (path / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes instead of {entry['bytes']}"
            if contents and _sha256(path / name) != entry["sha256"]:
                return f"{name} does not match its checksum"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _render_manifest(files: dict[str, dict]) -> bytes:
    listing = json.dumps(files, sort_keys=True)
    digest = hashlib.sha256(listing.encode()).hexdigest()
    return json.dumps({"files": files, "sha256": digest}, sort_keys=True, indent=1).encode()


def _read_manifest(path: Path) -> dict[str, dict]:
    """Raises ValueError unless the manifest is byte for byte what its own content renders to."""
    data = (path / MANIFEST).read_bytes()
    parsed = json.loads(data)
    if not isinstance(parsed, dict) or not isinstance(parsed.get("files"), dict):
        raise ValueError("no file list")
    if _render_manifest(parsed["files"]) != data:
        raise ValueError("checksum")
    return parsed["files"]


def seal(folder: Path) -> None:
    """Sync every file and folder, then write the manifest over them and sync it too."""
    files: dict[str, dict] = {}
    folders = [folder]
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            folders.append(path)
            continue
        fsync_file(path)
        name = path.relative_to(folder).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    (folder / MANIFEST).write_bytes(_render_manifest(files))
    fsync_file(folder / MANIFEST)
    for path in folders:
        fsync_folder(path)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
