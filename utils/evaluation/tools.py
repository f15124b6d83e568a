"""Names and colours of the structures for ITK-SNAP and 3D Slicer, as in the pictures."""

from collections.abc import Sequence
from pathlib import Path

from utils.files import OutputFolder
from utils.plots import STRUCTURE_COLOURS


def write_label_names(outputs: OutputFolder, class_names: Sequence[str], folder: str = ".") -> None:
    """Write labels.txt for ITK-SNAP and labels.ctbl for 3D Slicer into a folder in `outputs`."""
    structures = list(zip(range(1, len(class_names)), class_names[1:], STRUCTURE_COLOURS, strict=False))
    colours = [" ".join(map(str, bytes.fromhex(colour[1:]))) for _, _, colour in structures]
    snap = ['0 0 0 0 0 0 0 "Clear Label"']  # index, red, green, blue, opacity, visible, mesh visible, name
    snap += [f'{label} {rgb} 1 1 1 "{name}"' for (label, name, _), rgb in zip(structures, colours, strict=True)]
    slicer = [f"0 {class_names[0]} 0 0 0 0"]
    slicer += [f"{label} {name} {rgb} 255" for (label, name, _), rgb in zip(structures, colours, strict=True)]
    for suffix, lines in (("txt", snap), ("ctbl", slicer)):
        outputs.claim(str(Path(folder, f"labels.{suffix}"))).write_text("\n".join(lines) + "\n")
