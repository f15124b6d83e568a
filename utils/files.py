"""Folders that results are written into: only what this program has written there is overwritten or deleted."""

from pathlib import Path

from utils.errors import UserError

RECORD = ".semidg-files"  # in such a folder: the files that this program made there, a relative path a line


class OutputFolder:
    """A folder of results, with a record of the files that this program made in it."""

    def __init__(self, folder: Path):
        self.folder, self.record = folder, folder / RECORD
        self.made = set(self.record.read_text().splitlines()) if self.record.is_file() else set()
        self.claimed: set[str] = set()

    def require_free(self, *names: str) -> None:
        """Raise UserError when a file of that name is there and this program did not make it."""
        for name in names:
            if name not in self.made and ((self.folder / name).exists() or (self.folder / name).is_symlink()):
                raise UserError(
                    f"{self.folder / name} is there, and {self.record} does not say that this program made it: it is "
                    "not overwritten. Move it away, or choose another folder"
                )

    def claim(self, name: str) -> Path:
        """Return the path to write `name` at, noted as made by this program; raises as `require_free`."""
        self.require_free(name)
        path = self.folder / name
        if name not in self.made:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.record, "a") as file:  # before the file itself, so that a kill leaves none unclaimed
                file.write(name + "\n")
        self.made.add(name)
        self.claimed.add(name)
        return path

    def remove_stale(self) -> None:
        """Delete what an earlier use of the folder made and this one has not claimed."""
        for name in self.made - self.claimed:
            (self.folder / name).unlink(missing_ok=True)
        for subfolder in {(self.folder / name).parent for name in self.made} - {self.folder}:
            if subfolder.is_dir() and not any(subfolder.iterdir()):
                subfolder.rmdir()
        self.made = set(self.claimed)
        if self.folder.is_dir():
            self.record.write_text("".join(f"{name}\n" for name in sorted(self.made)))
