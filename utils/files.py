"""Files: written atomically, folders held by one process, nothing of the user's overwritten."""

import codecs
import csv
import errno
import fcntl
import io
import json
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from utils.errors import UserError, first_line, naming

NIFTI = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
LOCK = ".lock"  # file in a folder that a process works in
RECORD = ".semidg-files"  # the files that this program made in a folder, one a line


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which it then replaces, flushed to the disk."""
    temporary = path.with_name(f".tmp-{path.name}")  # libraries know a format by the suffix
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # by the umask, which not every library follows
        yield temporary
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({first_line(error)}); the earlier state is intact") from error
    finally:
        with suppress(OSError):  # a read-only folder
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content) -> None:
    """Write `content` as indented JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict:
    """Read what `write_json` wrote; UserError when it is missing, damaged or no dictionary."""
    with naming(path, "is missing or damaged"):
        return dict(json.loads(path.read_text()))


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; UserError when another one does.

    A POSIX record lock: it goes with the process that took it, however that dies, and forked workers do not inherit it.
    """
    require_writable(folder, "name or --output")
    with open(folder / LOCK, "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(f"{folder} is in use by another process: wait, or choose another name") from error
            print(f"warning: {folder}: no locks on its disk ({error.strerror}); start no second process there")
        yield


def require_space(folder: Path, need: int, content: str = "checkpoints") -> None:
    """Raise UserError when fewer than the `need` bytes of a content are free at `folder`."""
    if (free := shutil.disk_usage(folder).free) < need:
        raise UserError(f"{folder}: {content} take {need / 1e9:.1f} GB, only {free / 1e9:.1f} GB are free there")


def require_writable(folder: Path, choice: str) -> None:
    """Make a folder and try to write in it; UserError with what to choose instead."""
    with naming(folder, "cannot be written", errors=OSError, remedy=f": choose another {choice}"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


class OutputFolder:
    """A folder of results, with a record of what this program made in it."""

    def __init__(self, folder: Path):
        self.folder, self.record = folder, folder / RECORD
        names = self.record.read_text().splitlines() if self.record.is_file() else []
        self.made = {name for name in names if not (Path(name).is_absolute() or ".." in Path(name).parts)}
        self.claimed: set[str] = set()

    def require_free(self, *names: str) -> None:
        """Raise UserError when a file of a name is there that this program did not make."""
        for path in (self.folder / name for name in names if name not in self.made):
            if path.exists() or path.is_symlink():
                unknown = f"{self.record} does not say that this program made it: it is not overwritten"
                raise UserError(f"{path} is there, and {unknown}. Move it away, or choose another folder")

    def claim(self, name: str) -> Path:
        """Return the path for `name`, noted as made here; raises as `require_free`."""
        self.require_free(name)
        path = self.folder / name
        if name not in self.made:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.record, "a") as file:  # first: a kill leaves none unclaimed
                file.write(name + "\n")
        self.made.add(name)
        self.claimed.add(name)
        return path

    def remove_stale(self) -> None:
        """Delete what an earlier use of the folder made and this one did not claim."""
        for name in self.made - self.claimed:
            (self.folder / name).unlink(missing_ok=True)
        for subfolder in {(self.folder / name).parent for name in self.made} - {self.folder}:
            with suppress(OSError):  # not empty, or gone
                subfolder.rmdir()
        self.made = set(self.claimed)
        if self.folder.is_dir():
            self.record.write_text("".join(f"{name}\n" for name in sorted(self.made)))


def nifti_files(paths: Sequence[Path], *, deep: bool = False) -> list[Path]:
    """Return the files among `paths`, and the NIfTI files in folders, with `deep` in all below."""
    files = []
    for path in paths:
        if path.is_dir():
            inside = sorted(path.rglob("*") if deep else path.iterdir())
            files += [p for p in inside if NIFTI.search(p.name) and "/." not in f"/{p.relative_to(path)}"]
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    return list(dict.fromkeys(files))


def file_stem(path: Path) -> str:
    """Return a file's name without .nii or .nii.gz."""
    return NIFTI.sub("", path.name)


class Table(NamedTuple):
    """Content of a CSV or XLSX file, less blanks around the cells and empty rows."""

    columns: list[str]  # as they are written
    rows: list[dict[str, str]]  # cells by lower-case column name; "" where one is missing


def read_table(path: Path) -> Table:
    """Read a CSV or XLSX file, in any spreadsheet's delimiter and encoding."""
    with naming(path, "cannot be read as a table"):  # openpyxl raises what zip and XML raise
        if path.suffix.lower() == ".xlsx":
            import openpyxl  # slow to import

            lines = list(openpyxl.load_workbook(path, data_only=True).active.values)
        else:
            content = path.read_bytes()
            try:
                text = content.decode("utf-8-sig")
            except UnicodeDecodeError:
                wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
                text = content.decode("utf-16") if wide else content.decode("cp1252", errors="replace")
            delimiter = max(",;\t", key=text.split("\n")[0].count)
            lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    # Spreadsheets turn 3 into 3.0.
    texts = [[re.sub(r"^(\d+)\.0+$", r"\1", str("" if c is None else c).strip()) for c in line] for line in lines]
    header, *rows = [*filter(any, texts)] or [[]]
    columns = [" ".join(name.split()) for name in header]
    names = [name.casefold() for name in columns]
    return Table(columns, [defaultdict(str, zip(names, row, strict=False)) for row in rows])
