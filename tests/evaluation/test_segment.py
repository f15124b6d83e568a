"""New scans: label maps in the scan's own grid, in the right place, whatever its size, spacing and orientation."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import ROOT
from torch import nn

import mms_dataloader
import scgm_dataloader
from config import MMS
from utils.data.volume import PlaneMap, Volume
from utils.errors import UserError
from utils.evaluation.metrics import largest_components
from utils.evaluation.predict import predict
from utils.evaluation.runs import TrainedRun
from utils.evaluation.segment import NOTE, Segmenter, segment_files

CPU = torch.device("cpu")


class Brightness(nn.Module):
    """A network whose label is read off the brightness: 0, 1, 2, 3 in quarters of [0, 1]."""

    def forward(self, image):
        levels = torch.arange(4) / 4 + 0.125
        return -80 * (image - levels[None, :, None, None]).abs()


def segmenter(net=None, dataset=mms_dataloader.DATASET, **changes):
    """A segmenter of MMS settings at 288 px; changes are of its own fields or of the run's config."""
    own = {
        "precision": "fp32", "batch_size": 32, "tta": False, "keep_largest": False, "confidence": False,
        "center": None, "slice_axis": None,
    }  # fmt: skip
    config = replace(MMS, **{name: value for name, value in changes.items() if name not in own})
    run = TrainedRun(Path(), "best", [net or Brightness()] * 2, config, {}, None, CPU)
    return Segmenter(run=run, dataset=dataset, **{name: changes.get(name, value) for name, value in own.items()})


def phantom(shape, zooms, center_mm=(0, 0), seed=0):
    """Labels that brightness can show: rings around a core of 3, so that no edge passes another label."""
    x, y = ((np.arange(n) - (n - 1) / 2) * z - c for n, z, c in zip(shape[:2], zooms, center_mm, strict=False))
    radius = np.hypot(x[:, None], y[None])
    plane = np.select([radius < 20, radius < 35, radius < 55], [3, 2, 1])
    return np.broadcast_to(plane.reshape(*plane.shape, *(1,) * (len(shape) - 2)), shape).astype(np.uint8)


def oblique(zooms):
    from scipy.spatial.transform import Rotation

    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", [20, -35, 50], degrees=True).as_matrix() @ np.diag(zooms)
    affine[:3, 3] = [-80, 30, 12]
    return affine


def write(path, labels, affine, sform=2, qform=1):
    image = nib.Nifti1Image(labels.astype(np.int16) * 1000, affine)
    image.set_sform(affine, sform)
    image.set_qform(affine, qform)
    nib.save(image, path)


@pytest.mark.parametrize(
    ("shape", "zooms"),
    [
        ((256, 216, 4), (1.35, 1.35, 8)),
        ((301, 187, 3), (0.7, 0.7, 10)),
        ((129, 140, 3), (2, 2, 6)),
        ((200, 260, 2), (0.9, 1.6, 5)),
        ((160, 192, 2, 3), (1.5, 1.5, 8)),
        ((512, 512, 2), (0.8, 0.8, 8)),
    ],
)
def test_label_maps_lie_where_the_organ_lies(tmp_path, shape, zooms):
    truth = phantom(shape, zooms, (6, -9))
    affine = oblique(zooms)
    write(tmp_path / "scan_sa.nii.gz", truth, affine)
    before = (tmp_path / "scan_sa.nii.gz").read_bytes()
    segment_files(segmenter(), [tmp_path / "scan_sa.nii.gz"], tmp_path / "out")
    result, source = nib.load(tmp_path / "out/scan_sa_seg.nii.gz"), nib.load(tmp_path / "scan_sa.nii.gz")
    assert result.shape == shape and result.get_data_dtype() == np.uint8
    assert (result.affine == source.affine).all() and result.header.get_zooms() == source.header.get_zooms()
    assert result.header["sform_code"] == 2 and result.header["qform_code"] == 1
    assert result.header["descrip"].item().decode() == NOTE
    labels = np.asarray(result.dataobj)
    inside = np.abs((np.arange(shape[0]) - (shape[0] - 1) / 2) * zooms[0]) < 158
    for label in (1, 2, 3):
        ours, theirs = labels[inside] == label, truth[inside] == label
        dice = 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum())
        assert dice >= (0.95 if min(zooms[:2]) < 1 else 0.97)
        offset = np.mean(np.nonzero(ours), axis=1)[:2] - np.mean(np.nonzero(theirs), axis=1)[:2]
        assert np.abs(offset).max() < 0.5  # voxels
    assert (tmp_path / "scan_sa.nii.gz").read_bytes() == before


def test_center_moves_the_field_of_view(tmp_path):
    truth = phantom((400, 400, 2), (1.1, 1.1, 8), (158, 0))  # half of it outside the centred field of view
    write(tmp_path / "scan.nii.gz", truth, np.diag([1.1, 1.1, 8, 1]))
    middle = (199.5 + 158 / 1.1, 199.5)
    for center, least in ((None, None), (middle, 0.97)):
        segment_files(segmenter(center=center), [tmp_path / "scan.nii.gz"], tmp_path / "out", overwrite=True)
        ours = np.asarray(nib.load(tmp_path / "out/scan_seg.nii.gz").dataobj) == 3
        dice = 2 * (ours & (truth == 3)).sum() / (ours.sum() + (truth == 3).sum())
        assert dice > least if least else dice < 0.8
    with pytest.raises(UserError, match=r"outside the image of \(400, 400\)"):
        segment_files(segmenter(center=(500, 0)), [tmp_path / "scan.nii.gz"], tmp_path / "other")


def test_prediction_does_not_depend_on_order_or_batch_size(tmp_path, build_tiny):
    torch.manual_seed(0)
    net = build_tiny(4).eval()
    with torch.no_grad():
        net.classifier.weight *= 100  # so that an untrained network uses all its classes
        net.classifier.bias.zero_()
    rng = np.random.default_rng(0)
    for name in "ab":
        scan = rng.gamma(2, 200, (150, 140, 5)).astype(np.int16)
        nib.save(nib.Nifti1Image(scan, np.diag([1.5, 1.5, 8, 1])), tmp_path / f"{name}.nii.gz")
    results = []
    for number, (order, size) in enumerate([("ab", 32), ("ba", 32), ("ab", 2)]):
        out = tmp_path / str(number)
        files = [tmp_path / f"{name}.nii.gz" for name in order]
        segment_files(segmenter(net, batch_size=size, confidence=True), files, out)
        results.append([np.asarray(nib.load(out / f"{name}_seg.nii.gz").dataobj) for name in "ab"])
        for kind in ("confidence", "agreement"):
            values = nib.load(out / f"a_{kind}.nii.gz").get_fdata()
            assert values.shape == (150, 140, 5) and values.min() >= 0 and values.max() <= 1.0001
    assert len(np.unique(results[0][0])) > 1
    for first, other in zip(results[0], results[1], strict=True):
        assert (first == other).all()
    for first, other in zip(results[0], results[2], strict=True):
        assert (first != other).mean() < 1e-4


def test_tta_is_the_mean_over_flips_and_rotations(build_tiny):
    nets = [build_tiny(4).eval() for _ in range(2)]
    image = torch.rand(3, 1, 20, 20)
    expected = 0
    for turns in range(4):
        for axes in ([], [-1]):
            view = torch.rot90(image, turns, (-2, -1)).flip(axes)
            mean = sum(net(view).softmax(1) for net in nets) / 2
            expected = expected + torch.rot90(mean.flip(axes), -turns, (-2, -1)) / 8
    probability, _ = predict(nets, image, precision="fp32", tta=True)
    assert torch.allclose(probability, expected, atol=1e-6)
    turned, _ = predict(nets, torch.rot90(image, 1, (-2, -1)), precision="fp32", tta=True)
    assert torch.allclose(torch.rot90(turned, -1, (-2, -1)), probability, atol=1e-6)


def test_confidence_is_the_variance_between_the_views(build_tiny):
    """Slices of one amplitude leave nothing to be unsure of; other slices do. Agreement is 1 for equal networks."""
    torch.manual_seed(0)
    net = build_tiny(4).eval()
    same = np.repeat(np.random.default_rng(0).random((1, 120, 120)), 4, 0)
    plane = PlaneMap((120, 120), (1.5, 1.5), 300, 1.1)
    maps = segmenter(net, confidence=True).frame(same, plane)[0]
    inside = plane.inside()
    assert np.allclose(maps["confidence"][:, inside], 1, atol=1e-4)
    assert np.allclose(maps["agreement"][:, inside], 1, atol=1e-5)
    other = same * np.linspace(1, 3, 120)[None, :, None] ** np.arange(4)[:, None, None]
    maps = segmenter(net, confidence=True).frame(other, plane)[0]
    assert maps["confidence"][:, inside].min() < 0.9999
    half = segmenter(net, confidence=True, fourier_ratio=0.5).frame(other, plane)[0]
    assert half["confidence"][:, inside].min() > maps["confidence"][:, inside].min()
    none = segmenter(net, confidence=True, fourier_ratio=0.0).frame(other, plane)[0]
    assert np.allclose(none["confidence"][:, inside], 1, atol=1e-4)


def test_confidence_uses_the_fourier_mode_of_the_run(build_tiny):
    """Mode AM mixes all frequencies by fourier_alpha, as the formula on whole spectra says; lambda plays no part."""
    net = build_tiny(4).eval()
    slices = np.random.default_rng(0).random((4, 120, 120))
    plane = PlaneMap((120, 120), (1.5, 1.5), 300, 1.1)
    maps = {
        alpha: segmenter(net, confidence=True, fourier_mode="AM", fourier_ratio=0.0, fourier_alpha=alpha).frame(
            slices, plane
        )[0]["confidence"]
        for alpha in (0.0, 0.3, 1.0)
    }
    assert np.allclose(maps[0.0][:, plane.inside()], 1, atol=1e-4)
    assert maps[1.0].mean() < maps[0.3].mean() < maps[0.0].mean()
    canvas = plane.to_canvas(mms_dataloader.normalize(slices.astype(np.float32))).astype(np.float16)
    view = canvas[:, None, 6:-6, 6:-6].astype(np.float32)
    other = np.roll(view, 2, 0)
    amplitude = 0.7 * np.abs(np.fft.fft2(view)) + 0.3 * np.abs(np.fft.fft2(other))
    fourier = np.fft.ifft2(amplitude * np.exp(1j * np.angle(np.fft.fft2(view)))).real.astype(np.float32)
    with torch.no_grad():
        plain, augmented = (net(torch.from_numpy(x)).softmax(1).numpy() for x in (view, fourier))
    expected = np.exp(-(plain * np.log(plain / augmented)).sum(1))
    found = plane.to_canvas(maps[0.3])[:, 6:-6, 6:-6]  # there and back smooths, so the means are compared
    inside = found > 0
    assert found[inside].mean() == pytest.approx(expected[inside].mean(), abs=1e-4)


def test_largest_component_is_kept_per_structure():
    labels = np.zeros((8, 8, 3), np.uint8)
    labels[0:3, 0:3] = 1
    labels[6, 6, 0] = 1
    labels[4:6, 4:6, 1] = 2
    labels[7, 0, 2] = 2
    kept = largest_components(labels)
    assert (kept[0:3, 0:3] == 1).all() and (kept == 1).sum() == 27
    assert (kept == 2).sum() == 4 and kept[7, 0, 2] == 0
    assert (largest_components(np.zeros((3, 3, 3), np.uint8)) == 0).all()


def test_scgm_uses_the_same_way(tmp_path):
    class Grey(nn.Module):
        def forward(self, image):
            return torch.cat([0.5 - image, image - 0.5], 1) * 80

    x = (np.arange(200) - 99.5) * 0.25
    disc = (np.hypot(x[:, None] - 5, x[None] + 4) < 6)[..., None].repeat(3, 2)
    write(tmp_path / "cord.nii", disc, np.diag([0.25, 0.25, 5, 1]))
    segment_files(segmenter(Grey(), scgm_dataloader.DATASET), [tmp_path], tmp_path / "out")
    ours = np.asarray(nib.load(tmp_path / "out/cord_seg.nii.gz").dataobj) == 1
    assert 2 * (ours & disc).sum() / (ours.sum() + disc.sum()) > 0.97


def test_confidence_of_a_single_slice_is_refused(tmp_path):
    """Its only partner were the slice itself, of which it would be sure everywhere."""
    write(tmp_path / "one.nii.gz", phantom((100, 100, 1), (2, 2, 8)), np.diag([2, 2, 8, 1]))
    with pytest.raises(UserError, match=r"one\.nii\.gz: --confidence compares with another slice"):
        segment_files(segmenter(confidence=True), [tmp_path], tmp_path / "out")
    segment_files(segmenter(), [tmp_path], tmp_path / "out")


def test_inputs_are_never_overwritten(tmp_path):
    """Neither a scan named like an output, nor a label map beside it, corrected by hand maybe."""
    for name in ("scan.nii.gz", "scan_seg.nii.gz"):
        write(tmp_path / name, phantom((60, 60, 2), (2, 2, 8)), np.diag([2, 2, 8, 1]))
    before = (tmp_path / "scan_seg.nii.gz").read_bytes()
    for inputs in ([tmp_path], [tmp_path / "scan.nii.gz", tmp_path / "scan_seg.nii.gz"]):
        with pytest.raises(UserError, match=r"scan_seg\.nii\.gz lies among the inputs and would be overwritten"):
            segment_files(segmenter(), inputs, tmp_path)
    assert (tmp_path / "scan_seg.nii.gz").read_bytes() == before


def test_corrected_label_maps_are_kept(tmp_path):
    write(tmp_path / "scan.nii.gz", phantom((60, 60, 2), (2, 2, 8)), np.diag([2, 2, 8, 1]))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/scan_seg.nii.gz").write_bytes(b"by hand")
    with pytest.raises(UserError, match=r"scan_seg\.nii\.gz .*--overwrite replaces them"):
        segment_files(segmenter(), [tmp_path / "scan.nii.gz"], tmp_path / "out")
    assert (tmp_path / "out/scan_seg.nii.gz").read_bytes() == b"by hand"
    segment_files(segmenter(), [tmp_path / "scan.nii.gz"], tmp_path / "out", overwrite=True)
    assert nib.load(tmp_path / "out/scan_seg.nii.gz").shape == (60, 60, 2)


def test_a_bad_scan_does_not_stop_the_others(tmp_path, capsys):
    folder = tmp_path / "scans"
    folder.mkdir()
    write(folder / "good.nii.gz", phantom((100, 100, 2), (2, 2, 8)), np.diag([2, 2, 8, 1]))
    (folder / "bad.nii.gz").write_bytes((folder / "good.nii.gz").read_bytes()[:300])
    with pytest.raises(UserError, match=r"1 of 2 scans failed:\n  .*bad.nii.gz: cannot be read whole"):
        segment_files(segmenter(), [folder], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == ["good_seg.nii.gz"]
    with pytest.raises(UserError, match=r"no \.nii or \.nii\.gz scan in"):  # it holds nothing but our own map
        segment_files(segmenter(), [tmp_path / "out"], tmp_path / "more")
    assert "left out as a label map, by its name: " in capsys.readouterr().out
    with pytest.raises(UserError, match="no such file or folder"):
        segment_files(segmenter(), [tmp_path / "none.nii.gz"], tmp_path / "out")
    (tmp_path / "other").mkdir()
    write(tmp_path / "other/good.nii", phantom((50, 50, 2), (2, 2, 8)), np.diag([2, 2, 8, 1]))
    with pytest.raises(UserError, match=r"several inputs would be written as good_seg\.nii\.gz"):
        segment_files(segmenter(), [folder / "good.nii.gz", tmp_path / "other"], tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    [
        "site1-sc01-mask-r1", "P1_sa_GT", "sub-01_T2starw_gmseg-manual", "a_mask", "mask", "a_Label", "a_labels",
        "a_dseg", "a-seg", "a_SEG", "a_seg-manual", "a-manual", "a_agreement", "a_confidence",
    ],
)  # fmt: skip
def test_label_maps_in_a_folder_are_left_out(tmp_path, capsys, name):
    for stem in ("site1-sc01-image", "gt_scanner", name):
        write(tmp_path / f"{stem}.nii.gz", phantom((60, 60, 2), (2, 2, 8)), np.diag([2, 2, 8, 1]))
    (tmp_path / f"._{name}.nii.gz").write_bytes(b"of a file browser")
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    segment_files(segmenter(), [tmp_path], tmp_path / "out")
    maps = {path.name for path in (tmp_path / "out").glob("*.nii.gz")}
    assert maps == {f"{stem}_seg.nii.gz" for stem in ("site1-sc01-image", "gt_scanner")}
    assert f"left out as a label map, by its name: {tmp_path / name}.nii.gz\n" in capsys.readouterr().out


def test_a_scan_of_few_whole_numbers_is_doubted(tmp_path, capsys):
    write(tmp_path / "scan.nii.gz", phantom((60, 60, 2), (2, 2, 8)), np.diag([2, 2, 8, 1]))
    segment_files(segmenter(), [tmp_path], tmp_path / "out")
    assert "scan.nii.gz: it holds only the values 0, 1000, 2000, 3000: is it a label map?" in capsys.readouterr().out
    grey = np.random.default_rng(0).random((60, 60, 4)).astype(np.float32)
    nib.save(nib.Nifti1Image(grey, np.diag([2, 2, 8, 1])), tmp_path / "scan.nii.gz")
    segment_files(segmenter(), [tmp_path], tmp_path / "out", overwrite=True)
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("array", "zoom", "reason"),
    [
        (np.zeros((60, 60, 2)), 2, "all voxels lie in 0 to 0"),
        (np.full((60, 60, 2), 7), 2, "all voxels lie in 7 to 7"),
        (np.arange(7200).reshape(60, 60, 2) % 900, 0.002, "correct the voxel size in the header"),
        (np.arange(7200).reshape(60, 60, 2) % 900, 20, "correct the voxel size in the header"),
    ],
)
def test_no_scan_is_refused_and_the_others_go_on(tmp_path, array, zoom, reason):
    nib.save(nib.Nifti1Image(array.astype(np.int16), np.diag([zoom, zoom, 8, 1])), tmp_path / "odd.nii.gz")
    write(tmp_path / "scan.nii.gz", phantom((60, 60, 2), (2, 2, 8)), np.diag([2, 2, 8, 1]))
    with pytest.raises(UserError, match=f"1 of 2 scans failed:\n  .*odd.nii.gz: .*{reason}"):
        segment_files(segmenter(), [tmp_path], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == ["scan_seg.nii.gz"]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(150, 140, 4), (150, 140, 4, 2)])
@pytest.mark.parametrize("axis", [1, 2])
def test_slices_on_another_axis(tmp_path, axis, shape):
    """A scan with its slices on another axis gives the same map on that axis, and without the flag is refused."""
    scan = np.random.default_rng(0).gamma(2, 200, shape).astype(np.int16)
    scan[40:90, 50:80] += 2000
    moved, zooms = np.moveaxis(scan, 2, axis - 1), np.insert([1.5, 1.25], axis - 1, 8)
    nib.save(nib.Nifti1Image(scan, np.diag([1.5, 1.25, 8, 1])), tmp_path / "third.nii.gz")
    nib.save(nib.Nifti1Image(moved, np.diag([*zooms, 1])), tmp_path / "moved.nii.gz")
    center = (60.0, 70.0)
    segment_files(segmenter(center=center, confidence=True), [tmp_path / "third.nii.gz"], tmp_path)
    unaware = tmp_path / "unaware"
    with pytest.raises(UserError, match=rf"1 of 2 .*\n  .*moved.* axis {axis}, not 3: name their axis by --slice-axis"):
        segment_files(segmenter(), [tmp_path / "moved.nii.gz", tmp_path / "third.nii.gz"], unaware)
    assert [path.name for path in unaware.glob("*.nii.gz")] == ["third_seg.nii.gz"]
    segment_files(segmenter(slice_axis=3), [tmp_path / "moved.nii.gz"], unaware)
    assert (unaware / "moved_seg.nii.gz").exists()  # taken as it is
    aware = segmenter(center=center, confidence=True, slice_axis=axis)
    segment_files(aware, [tmp_path / "moved.nii.gz"], tmp_path)
    for kind in ("seg", "confidence", "agreement"):
        third, found = (nib.load(tmp_path / f"{stem}_{kind}.nii.gz") for stem in ("third", "moved"))
        assert found.shape == moved.shape and (found.affine == np.diag([*zooms, 1])).all()
        assert np.array_equal(np.moveaxis(third.get_fdata(), 2, axis - 1), found.get_fdata())
    assert len(np.unique(nib.load(tmp_path / "third_seg.nii.gz").dataobj)) > 1


def test_square_pixels_wider_than_the_slices_are_thick_are_no_other_axis(tmp_path):
    write(tmp_path / "thin.nii.gz", phantom((60, 60, 2), (2, 2, 1.5)), np.diag([2, 2, 1.5, 1]))
    segment_files(segmenter(), [tmp_path], tmp_path / "out")
    assert (tmp_path / "out/thin_seg.nii.gz").exists()


class Full(nn.Module):
    """Fails as a machine does whose memory is full, at scans of more than 2 slices."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, image):
        if len(image) > 2:
            raise self.error
        return Brightness()(image)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        np._core._exceptions._ArrayMemoryError((9, 9), np.dtype(float)),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_full_memory_is_the_problem_of_one_scan(tmp_path, error):
    for name, depth in (("large", 3), ("small", 2)):
        write(tmp_path / f"{name}.nii.gz", phantom((60, 60, depth), (2, 2, 8)), np.diag([2, 2, 8, 1]))
    with pytest.raises(UserError, match=r"1 of 2 scans failed:\n  .*large.*out of memory: .*--batch-size \(now 32\)"):
        segment_files(segmenter(Full(error)), [tmp_path], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == ["small_seg.nii.gz"]


def test_other_errors_of_the_network_are_not_hidden(tmp_path):
    write(tmp_path / "scan.nii.gz", phantom((60, 60, 3), (2, 2, 8)), np.diag([2, 2, 8, 1]))
    with pytest.raises(RuntimeError, match="shapes"):
        segment_files(segmenter(Full(RuntimeError("shapes do not fit"))), [tmp_path], tmp_path / "out")


@pytest.mark.slow
def test_memory_grows_by_little_more_than_the_scan(tmp_path):
    """All classes of a frame at once took 18 times the scan's float32 size; the program itself takes 3 times."""
    scan = np.tile(np.arange(512, dtype=np.float32)[:, None, None], (1, 512, 200))  # whose map packs fast
    nib.save(nib.Nifti1Image(scan, np.diag([0.7, 0.7, 8, 1])), tmp_path / "scan.nii")
    nib.save(nib.Nifti1Image(scan[:100, :100, :4], np.diag([0.7, 0.7, 8, 1])), tmp_path / "small.nii")
    code = (
        "import sys; from pathlib import Path; from test_segment import segmenter, segment_files\n"
        # of this process alone: getrusage begins with the peak of the process that started it
        "peak = lambda: 1024 * int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "folder = Path(sys.argv[1]); segment = segmenter(batch_size=8)\n"
        "segment_files(segment, [folder / 'small.nii'], folder / 'out'); before = peak()\n"
        "segment_files(segment, [folder / 'scan.nii'], folder / 'out'); print('grown by', peak() - before)"
    )
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests/evaluation'}"}
    command = [sys.executable, "-c", code, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | path)
    assert int(done.stdout.split("grown by")[1]) < 3 * scan.nbytes


@pytest.mark.parametrize("moved_mm", [(127, 0), (-90, 90), (0, 0)])
def test_the_networks_find_the_organ(tmp_path, capsys, moved_mm):
    """Moved by up to 40 % of the field of view of 317 mm; a bright speck elsewhere does not draw the centre."""
    shape, zooms, dice = (360, 330, 3), (1.4, 1.5, 8), []
    for place in ((0, 0), moved_mm):
        truth = phantom(shape, zooms, place).copy()
        truth[5:8, 5:8] = 3
        write(tmp_path / "scan.nii.gz", truth, np.diag([*zooms, 1]))
        out = tmp_path / f"{place}"
        segment_files(segmenter(center="auto"), [tmp_path / "scan.nii.gz"], out, overwrite=True)
        truth[5:8, 5:8] = 0
        ours = np.asarray(nib.load(out / "scan_seg.nii.gz").dataobj)
        dice += [2 * ((ours == 3) & (truth == 3)).sum() / ((ours == 3).sum() + (truth == 3).sum())]
        said = capsys.readouterr().out.split("center: ")[1].split(",")[0].split()
        expected = (np.array(shape[:2]) - 1) / 2 + np.array(place) / zooms[:2]
        assert np.abs(np.array(said, float) - expected).max() < 2  # voxels
    assert dice[1] >= 0.98 * dice[0] > 0.95


def test_nothing_found_keeps_the_image_center(tmp_path, capsys):
    class Nothing(nn.Module):
        def forward(self, image):
            return torch.cat([image * 0 + 9, image.repeat(1, 3, 1, 1) * 0], 1)

    write(tmp_path / "scan.nii.gz", phantom((300, 300, 2), (1.4, 1.4, 8)), np.diag([1.4, 1.4, 8, 1]))
    segment_files(segmenter(Nothing(), center="auto"), [tmp_path / "scan.nii.gz"], tmp_path / "out")
    assert "the networks find nothing, so the image's centre is taken" in capsys.readouterr().out
    assert not np.asarray(nib.load(tmp_path / "out/scan_seg.nii.gz").dataobj).any()


@pytest.mark.parametrize("frames", [1, 4])
def test_finding_costs_no_more_than_predicting(frames):
    """Counted in pixels that the networks see."""
    seen = []

    class Counting(Brightness):
        def forward(self, image):
            seen.append(image.numel())
            return super().forward(image)

    shape = (400, 400, 10, frames)
    volume = Volume(phantom(shape, (1.2, 1.2, 8)) * 9.0, None, np.eye(4), (1.2, 1.2, 8.0))
    segmenter(Counting()).volume(volume)
    plain = sum(seen)
    seen.clear()
    segmenter(Counting(), center="auto").volume(volume)
    assert plain < sum(seen) <= 2 * plain
