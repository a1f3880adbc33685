"""Which files of a folder are read, and which are left out and why."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path


RECORDS = {"dataset_info.json", "state.json", "dataset_dict.json"}  # of `datasets`' save_to_disk
NO_FILES = "no ordinary files"  # pipes, sockets and devices, which may be without an end
SHOWN_NAMES = 3


@dataclass
class Listing:
    """The files below a folder.

    files: sorted by path; each under one name, also if links lead to it.
    left_out: reason -> names of the files and folders, relative to the folder.
    """

    root: Path
    files: list[Path] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, reason: str, paths: Iterable[Path]) -> None:
        for path in paths:
            self.left_out.setdefault(reason, []).append(path.relative_to(self.root).as_posix())

    def keep(self, wanted: Iterable[Path], reason: str) -> None:
        """Keep these of the files; the others are left out, for `reason`."""
        kept = set(wanted)
        self.leave_out(reason, [path for path in self.files if path not in kept])
        self.files = [path for path in self.files if path in kept]

    @property
    def readme(self) -> Path | None:
        """The one at its top, which is about the data."""
        return next(
            (path for path in self.files if path.parent == self.root and path.name.lower() == "readme.md"), None
        )


def list_files(root: Path) -> Listing:
    """The files below a folder. Links are followed once; hidden files and folders, and what `datasets` records beside
    its data, are left out."""
    listing = Listing(root)
    links: list[Path] = []
    seen = {root.resolve()}
    _walk(root, listing, links, seen)
    while links:  # after the files themselves, which are then not read under the name of a link
        link = links.pop(0)
        target = Path(os.path.realpath(link))  # Path.resolve raises for a link that leads to itself
        if not target.exists():
            listing.leave_out("broken links", [link])
        elif target in seen or target in root.resolve().parents:
            listing.leave_out("links to what is read already", [link])
        elif target.is_dir():
            seen.add(target)
            _walk(link, listing, links, seen)
        elif target.is_file():
            seen.add(target)
            listing.files.append(link)
        else:
            listing.leave_out(NO_FILES, [link])
    listing.files.sort()
    listing.keep([path for path in listing.files if path.name not in RECORDS], "records of `datasets`")
    return listing


def _walk(folder: Path, listing: Listing, links: list[Path], seen: set[Path]) -> None:
    """Enter the files of a folder into `listing`; collect links in `links` and the real paths visited in `seen`."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            listing.leave_out("hidden", _files_of(path))
        elif path.is_symlink():
            links.append(path)
        elif path.resolve() in seen:
            listing.leave_out("links to what is read already", [path])
        elif path.is_dir():
            seen.add(path.resolve())
            _walk(path, listing, links, seen)
        elif path.is_file():
            seen.add(path.resolve())
            listing.files.append(path)
        else:
            listing.leave_out(NO_FILES, [path])


def _files_of(path: Path) -> Iterator[Path]:
    if path.is_symlink() or not path.is_dir():
        yield path
        return
    for folder, _, names in os.walk(path):
        yield from (Path(folder) / name for name in names)


def describe_left_out(left_out: dict[str, list[str]]) -> str:
    """One line: how many files, why, and the first names."""
    reasons = [f"{len(names):,} {reason} ({first_names(names)})" for reason, names in left_out.items()]
    total = sum(map(len, left_out.values()))
    return f"left out {total:,} file{'s' if total > 1 else ''}: {'; '.join(reasons)}"


def first_names(names: list[str]) -> str:
    more = ", ..." if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more
