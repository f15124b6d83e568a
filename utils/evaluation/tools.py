"""Names and colours of the structures for ITK-SNAP and 3D Slicer, as in the pictures."""

from collections.abc import Sequence
from pathlib import Path

from utils.files import OutputFolder
from utils.plots import STRUCTURE_COLOURS


def write_label_names(outputs: OutputFolder, class_names: Sequence[str], folder: str = ".") -> None:
    """Write labels.txt for ITK-SNAP and labels.ctbl for 3D Slicer into a folder in `outputs`."""
    snap = '0 0 0 0 0 0 0 "Clear Label"\n'  # index, red, green, blue, opacity, visible, mesh visible, name
    slicer = f"0 {class_names[0]} 0 0 0 0\n"
    for label, (name, colour) in enumerate(zip(class_names[1:], STRUCTURE_COLOURS, strict=False), start=1):
        rgb = " ".join(map(str, bytes.fromhex(colour[1:])))
        snap += f'{label} {rgb} 1 1 1 "{name}"\n'
        slicer += f"{label} {name} {rgb} 255\n"
    for suffix, text in (("txt", snap), ("ctbl", slicer)):
        outputs.claim(str(Path(folder, f"labels.{suffix}"))).write_text(text)
