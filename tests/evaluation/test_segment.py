"""New scans: label maps in the scan's own grid, in the right place, whatever its size, spacing and orientation."""

import csv
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import CPU, MMS
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch import nn

from config import MMS as MMS_CONFIG
from utils.data.volume import PlaneMap, Volume
from utils.device import autocast_context
from utils.errors import UserError
from utils.evaluation.predict import Predictor
from utils.evaluation.runs import TrainedRun
from utils.evaluation.segment import NOTE, clinical_figures, segment_files, segment_volume, structure_quality

BOX = np.diag([2, 2, 8, 1])  # mm


class Brightness(nn.Module):
    """A network whose label is read off the brightness: 0, 1, 2, 3 in quarters of [0, 1]."""

    def __init__(self):
        super().__init__()
        self.levels = nn.Parameter(torch.arange(4) / 4 + 0.125, requires_grad=False)

    def forward(self, image):
        return -80 * (image - self.levels[None, :, None, None]).abs()


class Failing(Brightness):
    """Raises an error where `fails` says so, by the number of the call and that of the slices."""

    def __init__(self, error, fails=lambda call, slices: slices > 2):
        super().__init__()
        self.error, self.fails, self.calls = error, fails, 0

    def forward(self, image):
        self.calls += 1
        if self.fails(self.calls, len(image)):
            raise self.error
        return super().forward(image)


def trained(net=None, tta=False, **changes):
    """A run of one network twice, with MMS settings at 288 px; changes are of its config."""
    config, autocast = replace(MMS_CONFIG, **changes), partial(autocast_context, CPU, "fp32")
    predictor = Predictor([net or Brightness()] * 2, None, config, autocast, tta)
    return TrainedRun(Path(), "best", predictor, config, {})


def segment(inputs, output, run=None, **options):
    inputs = [inputs] if isinstance(inputs, Path) else inputs
    segment_files(run or trained(), MMS, inputs, output, **options)


def phantom(shape, zooms, center_mm=(0, 0)):
    """Labels that brightness can show: rings around a core of 3, so that no edge passes another label."""
    x, y = ((np.arange(n) - (n - 1) / 2) * z - c for n, z, c in zip(shape[:2], zooms, center_mm, strict=False))
    radius = np.hypot(x[:, None], y[None])
    plane = np.select([radius < 20, radius < 35, radius < 55], [3, 2, 1])
    return np.broadcast_to(plane.reshape(*plane.shape, *(1,) * (len(shape) - 2)), shape).astype(np.uint8)


def write(path, labels=None, affine=BOX):
    """Write a scan of a phantom's brightness; sform and qform have different codes."""
    labels = phantom((60, 60, 2), (2, 2, 8)) if labels is None else labels
    path.parent.mkdir(exist_ok=True)
    image = nib.Nifti1Image((labels * 1000.0).astype(np.int16), affine)
    image.set_sform(affine, 2)
    image.set_qform(affine, 1)
    nib.save(image, path)
    return path


def read(path):
    return np.asarray(nib.load(path).dataobj)


def dice(ours, theirs):
    return 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum())


def maps_in(folder):
    return {path.name for path in folder.glob("*.nii.gz")}


@pytest.mark.parametrize(("shape", "zooms"), [
    ((301, 187, 3), (0.7, 0.7, 10)), ((129, 140, 3), (2, 2, 6)), ((200, 260, 2), (0.9, 1.6, 5)),
    ((160, 192, 2, 3), (1.5, 1.5, 8)),
])  # fmt: skip
def test_label_maps_lie_where_the_organ_lies(tmp_path, shape, zooms):
    truth, oblique = phantom(shape, zooms, (6, -9)), np.eye(4)
    oblique[:3, :3] = Rotation.from_euler("xyz", [20, -35, 50], degrees=True).as_matrix() @ np.diag(zooms)
    oblique[:3, 3] = [-80, 30, 12]
    before = write(tmp_path / "scan_sa.nii.gz", truth, oblique).read_bytes()
    segment(tmp_path / "scan_sa.nii.gz", tmp_path / "out")
    result, source = nib.load(tmp_path / "out/scan_sa_seg.nii.gz"), nib.load(tmp_path / "scan_sa.nii.gz")
    assert result.shape == shape and result.get_data_dtype() == np.uint8
    assert (result.affine == source.affine).all() and result.header.get_zooms() == source.header.get_zooms()
    assert result.header["sform_code"] == 2 and result.header["qform_code"] == 1
    assert result.header["descrip"].item().decode().startswith(NOTE)
    labels = np.asarray(result.dataobj)
    inside = np.abs((np.arange(shape[0]) - (shape[0] - 1) / 2) * zooms[0]) < 158
    for label in (1, 2, 3):
        ours, theirs = labels[inside] == label, truth[inside] == label
        assert dice(ours, theirs) >= (0.95 if min(zooms[:2]) < 1 else 0.97)
        offset = np.mean(np.nonzero(ours), axis=1)[:2] - np.mean(np.nonzero(theirs), axis=1)[:2]
        assert np.abs(offset).max() < 0.5  # voxels
    assert (tmp_path / "scan_sa.nii.gz").read_bytes() == before


def test_center_moves_the_field_of_view(tmp_path, capsys):
    truth = phantom((400, 400, 2), (1.1, 1.1, 8), (158, 0))  # half of it outside the centred field of view
    write(tmp_path / "scan.nii.gz", truth, np.diag([1.1, 1.1, 8, 1]))
    for center, low, high in ((None, 0, 0.8), ((199.5 + 158 / 1.1, 199.5), 0.97, 1)):
        segment(tmp_path / "scan.nii.gz", tmp_path / "out", center=center, overwrite=True)
        assert low < dice(read(tmp_path / "out/scan_seg.nii.gz") == 3, truth == 3) < high
    with pytest.raises(UserError, match=r"outside the image of \(400, 400\)"):
        segment(tmp_path / "scan.nii.gz", tmp_path / "other", center=(500, 0))
    net = Brightness()  # that finds nothing: the image's centre is kept
    net.forward = lambda image: torch.cat([image * 0 + 9, image.repeat(1, 3, 1, 1) * 0], 1)
    segment(tmp_path / "scan.nii.gz", tmp_path / "none", trained(net), center="auto")
    assert "center: of the image, as the networks find nothing" in capsys.readouterr().out
    assert not read(tmp_path / "none/scan_seg.nii.gz").any()


def test_prediction_does_not_depend_on_order_or_batch_size(tmp_path, build_tiny):
    torch.manual_seed(0)
    net = build_tiny(4).eval()
    with torch.no_grad():
        net.classifier.weight *= 100  # so that an untrained network uses all its classes
        net.classifier.bias.zero_()
    files = [tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"]
    for seed, file in enumerate(files):
        write(file, np.random.default_rng(seed).gamma(2, 1, (150, 140, 5)), np.diag([1.5, 1.5, 8, 1]))
    results = []
    for number, (inputs, size) in enumerate([(files, 32), (files[::-1], 32), (files, 2)]):
        out = tmp_path / str(number)
        segment(inputs, out, trained(net), batch_size=size, confidence=True)
        results.append(np.stack([read(out / f"{name}_seg.nii.gz") for name in "ab"]))
        for kind in ("confidence", "agreement"):
            values = read(out / f"a_{kind}.nii.gz")
            assert values.shape == (150, 140, 5) and values.min() >= 0 and values.max() <= 1.0001
    assert len(np.unique(results[0])) > 1 and (results[0] == results[1]).all()
    assert (results[0] != results[2]).mean() < 1e-4


def test_tta_is_the_mean_over_flips_and_rotations(build_tiny):
    nets = [build_tiny(4).eval() for _ in range(2)]
    predictor = trained(tta=True, image_size=64).predictor._replace(nets=nets)
    view, maps = predictor.maps(torch.rand(3, 1, 300, 300), torch.rand(3, 256).sort().values)
    expected = 0
    for turns in range(4):
        for axes in ([], [-1]):
            turned = torch.rot90(view, turns, (-2, -1)).flip(axes)
            mean = sum(net(turned).softmax(1) for net in nets) / 2
            expected = expected + torch.rot90(mean.flip(axes), -turns, (-2, -1)) / 8
    assert torch.allclose(maps["probability"], expected, atol=1e-6)


def test_confidence_is_the_variance_between_the_views(build_tiny):
    """Slices of one amplitude leave nothing to be unsure of; other slices do. Agreement is 1 for equal networks."""
    torch.manual_seed(0)
    net = build_tiny(4).eval()
    inside = PlaneMap((120, 120), (1.5, 1.5), 300, 1.1).inside()

    def confidence(slices, ratio):
        volume = Volume(slices, None, np.eye(4), (1.5, 1.5, 8.0))
        run = trained(net, fourier_ratio=ratio)
        maps, _ = segment_volume(volume, run.predictor, MMS, confidence=True)
        assert np.allclose(maps["agreement"][inside], 1, atol=1e-5)
        return maps["confidence"][inside]

    same = np.repeat(np.random.default_rng(0).random((120, 120, 1)), 4, 2)
    assert np.allclose(confidence(same, 1.0), 1, atol=1e-4)
    other = same * np.linspace(1, 3, 120)[:, None, None] ** np.arange(4)
    whole, half, none = (confidence(other, ratio) for ratio in (1.0, 0.5, 0.0))
    assert whole.min() < 0.9999 and half.min() > whole.min() and np.allclose(none, 1, atol=1e-4)


def test_bad_outputs_are_said_before_the_work(tmp_path):
    """Maps of others, corrected by hand maybe, or inputs of their names; folders that cannot be written."""
    scan = write(tmp_path / "scan.nii.gz")
    by_hand = write(tmp_path / "scan_seg.nii.gz").read_bytes()
    for overwrite in (False, True):
        for inputs in ([tmp_path], [scan, tmp_path / "scan_seg.nii.gz"]):
            with pytest.raises(UserError, match=r"scan_seg\.nii\.gz is there, and .* Move it away"):
                segment(inputs, tmp_path, overwrite=overwrite)
    assert (tmp_path / "scan_seg.nii.gz").read_bytes() == by_hand
    for output in (scan, Path("/proc")):
        with pytest.raises(UserError, match=f"{output} cannot be written .*: choose another --output"):
            segment(scan, output, trained(Failing(AssertionError(), lambda *_: True)))


def test_an_interrupted_command_goes_on(tmp_path, capsys):
    """Maps that are there stay, corrected or not, until --overwrite; what has no map or no line is done."""
    scans, out = tmp_path / "scans", tmp_path / "out"
    for name in "abc":
        write(scans / f"{name}.nii.gz")
    stopped = Failing(KeyboardInterrupt(), lambda call, slices: call > 4)  # two networks a scan
    with pytest.raises(KeyboardInterrupt):
        segment(scans, out, trained(stopped), volumes=True)
    assert maps_in(out) == {"a_seg.nii.gz", "b_seg.nii.gz"}
    corrected = write(tmp_path / "corrected.nii.gz", np.ones((60, 60, 2))).read_bytes()  # all is LV
    for name in "ab":
        (out / f"{name}_seg.nii.gz").write_bytes(corrected)
    (out / "quality.csv").write_text("\n".join((out / "quality.csv").read_text().splitlines()[:4]))  # b has no line
    segment(scans, out, volumes=True)
    assert "1 of 3 scans are done already; --overwrite does them anew" in capsys.readouterr().out
    assert {row["scan"] for row in csv.DictReader((out / "quality.csv").open())} == {"a", "b", "c"}
    segment(scans, out, volumes=True)
    assert "3 of 3 scans are done already" in capsys.readouterr().out
    assert all((out / f"{name}_seg.nii.gz").read_bytes() == corrected for name in "ab")
    other = trained()._replace(checkpoint="last")
    with pytest.raises(UserError, match="another run has segmented a, b, c: choose another --output"):
        segment(scans, out, other)
    segment(scans, out, other, overwrite=True)
    assert read(out / "a_seg.nii.gz").any()
    assert len(maps_in(out)) == 3 and len((out / "quality.csv").read_text().splitlines()) == 1 + 3 * 3


def test_a_bad_scan_does_not_stop_the_others(tmp_path, capsys):
    good = write(tmp_path / "scans/good.nii.gz")
    (tmp_path / "scans/bad.nii.gz").write_bytes(good.read_bytes()[:300])
    with pytest.raises(UserError, match=r"1 of 2 scans failed:\n  .*bad\.nii\.gz"):
        segment(tmp_path / "scans", tmp_path / "out")
    assert maps_in(tmp_path / "out") == {"good_seg.nii.gz"}
    assert f"scans segmented into {tmp_path / 'out'}: 1." in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no NIfTI file in"):  # it holds nothing but our own map
        segment(tmp_path / "out", tmp_path / "more")
    with pytest.raises(UserError, match="no such file or folder"):
        segment(tmp_path / "none.nii.gz", tmp_path / "out")
    write(tmp_path / "other/good.nii")
    with pytest.raises(UserError, match=r"several inputs would be good_seg\.nii\.gz"):
        segment([good, tmp_path / "other"], tmp_path / "out")


def test_label_maps_in_a_folder_are_left_out(tmp_path, capsys):
    maps = [
        "site1-sc01-mask-r1", "P1_sa_GT", "sub-01_T2starw_gmseg-manual", "a_mask", "mask", "a_Label", "a_labels",
        "a_dseg", "a-seg", "a_SEG", "a_seg-manual", "a-manual", "a_agreement", "a_confidence",
    ]  # fmt: skip
    for stem in ("site1-sc01-image", "gt_scanner", *maps):
        write(tmp_path / f"{stem}.nii.gz")
    (tmp_path / "._mask.nii.gz").write_bytes(b"of a file browser")
    segment(tmp_path, tmp_path / "out")
    assert maps_in(tmp_path / "out") == {f"{stem}_seg.nii.gz" for stem in ("site1-sc01-image", "gt_scanner")}
    said = capsys.readouterr().out
    assert all(f"left out as a label map, by its name: {tmp_path / name}.nii.gz\n" in said for name in maps)


STACK = phantom((80, 70, 3, 2), (1.5, 1.25, 8))


@pytest.mark.parametrize(("array", "zooms", "options", "reason"), [
    (np.full((60, 60, 2), 7), (2, 2, 8), {}, "all voxels lie in 7000 to 7000"),
    (np.arange(7200).reshape(60, 60, 2) % 30, (20, 20, 8), {}, "correct the header"),
    (phantom((100, 100, 1), (2, 2, 8)), (2, 2, 8), {"confidence": True}, "--confidence compares with another slice"),
    (np.swapaxes(STACK, 0, 2), (8, 1.25, 1.5), {}, "belong on axis 3, frames on 4: exchange the axes"),
    (np.swapaxes(STACK, 1, 2), (1.5, 8, 1.25), {}, "belong on axis 3, frames on 4: exchange the axes"),
])  # fmt: skip
def test_no_scan_is_refused_and_the_others_go_on(tmp_path, array, zooms, options, reason):
    """Slices may be thinner than their square pixels are wide."""
    write(tmp_path / "odd.nii.gz", array, np.diag([*zooms, 1]))
    write(tmp_path / "scan.nii.gz", affine=np.diag([2, 2, 1.5, 1]))
    with pytest.raises(UserError, match=f"1 of 2 scans failed:\n  .*odd.nii.gz: .*{reason}"):
        segment(tmp_path, tmp_path / "out", **options)
    assert "scan_seg.nii.gz" in maps_in(tmp_path / "out")


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"),
])  # fmt: skip
def test_full_memory_is_the_problem_of_one_scan(tmp_path, error):
    for name, depth in (("large", 3), ("small", 2)):
        write(tmp_path / f"{name}.nii.gz", phantom((60, 60, depth), (2, 2, 8)))
    with pytest.raises(UserError, match=r"1 of 2 scans failed:\n  .*large.*out of memory: .*--batch-size \(now 8\)"):
        segment(tmp_path, tmp_path / "out", trained(Failing(error)))
    assert maps_in(tmp_path / "out") == {"small_seg.nii.gz"}
    with pytest.raises(RuntimeError, match="shapes"):  # other errors are not hidden
        segment(tmp_path / "large.nii.gz", tmp_path / "out", trained(Failing(RuntimeError("shapes do not fit"))))


@pytest.mark.parametrize("moved_mm", [(127, 0), (-90, 90), (0, 0)])
def test_the_networks_find_the_organ(tmp_path, capsys, moved_mm):
    """Moved by up to 40 % of the field of view of 317 mm; a bright speck elsewhere does not draw the centre."""
    shape, zooms, reached = (360, 330, 3), (1.4, 1.5, 8), []
    for place in ((0, 0), moved_mm):
        truth = phantom(shape, zooms, place).copy()
        truth[5:8, 5:8] = 3
        write(tmp_path / "scan.nii.gz", truth, np.diag([*zooms, 1]))
        segment(tmp_path / "scan.nii.gz", tmp_path / f"{place}", center="auto", overwrite=True)
        truth[5:8, 5:8] = 0
        reached += [dice(read(tmp_path / f"{place}/scan_seg.nii.gz") == 3, truth == 3)]
        said = capsys.readouterr().out.split("center: (")[1].split(")")[0].split(",")
        expected = (np.array(shape[:2]) - 1) / 2 + np.array(place) / zooms[:2]
        assert np.abs(np.array(said, float) - expected).max() < 2  # voxels
    assert reached[1] >= 0.98 * reached[0] > 0.95


def test_measures_of_known_defects():
    rng = np.random.default_rng(0)
    labels = np.zeros((6, 20, 20), np.uint8)
    labels[0:2, 2:6, 2:6] = 1  # breaks off in slices 2 and 3
    labels[4:6, 2:6, 2:6] = 1
    labels[1, 15, 15] = 2
    agreement = rng.random(labels.shape).astype(np.float32)
    first, second, third = structure_quality(labels, {"agreement": agreement}, MMS.class_names, 0.5)
    assert (first["structure"], first["volume_ml"]) == ("LV", 32.0)
    assert first["components"] == ndimage.label(labels == 1, np.ones((3, 3, 3)))[1] == 2
    assert first["gaps"] == pytest.approx(2 / 6) and second["gaps"] == 0
    assert first["agreement"] == pytest.approx(agreement[labels == 1].mean(), rel=1e-6)
    assert third == {"structure": "RV", "volume_ml": 0.0, "agreement": None, "components": 0, "gaps": 0.0}


def test_tables_that_people_save_again_are_read_and_keep_their_columns(tmp_path):
    """Of a spreadsheet with semicolons and a byte-order mark; the volumes are those of the rings themselves."""
    zooms, out = (1.4, 1.5, 8), tmp_path / "out"
    labels = phantom((220, 210, 4, 2), zooms)
    for name in ("one", "two"):
        write(tmp_path / f"{name}.nii.gz", labels, np.diag([*zooms, 1]))
    segment(tmp_path / "one.nii.gz", out, volumes=True)
    for table in (out / "quality.csv", out / "volumes.csv"):
        header, *lines = table.read_text().replace(",", ";").splitlines()
        text = "\n".join([f"{header};Remark", *(f"{line};mine" for line in lines), ";;"])
        table.write_bytes(text.encode("utf-8-sig"))
    segment([tmp_path / "one.nii.gz", tmp_path / "two.nii.gz"], out, volumes=True)
    rows = list(csv.DictReader((out / "quality.csv").open()))
    assert [(row["scan"], row["frame"]) for row in rows[::3]] == [(n, f) for n in ("one", "two") for f in "01"]
    assert [row["Remark"] for row in rows] == ["mine"] * 6 + [""] * 6
    assert rows[2]["structure"] == "RV" and rows[2]["components"] == "1"
    ml = (labels[..., 0] == 3).sum() * 1.4 * 1.5 * 8 / 1000
    assert float(rows[2]["volume_ml"]) == pytest.approx(ml, rel=0.05) and float(rows[2]["agreement"]) == 1
    one, two = csv.DictReader((out / "volumes.csv").open())
    assert one["Remark"] == "mine" and float(one["LV EDV (ml)"]) == float(two["LV EDV (ml)"])


def cine(*radii):
    """LV by its radius in each frame, around a core of RV: (200, 200, 3, T) of 1.5 mm; a frame of None is blank."""
    x = (np.arange(200) - 99.5) * 1.5
    distance = np.hypot(x[:, None], x[None])
    frames = [0 * distance if r is None else np.select([distance < 20, distance < r], [3, 1]) for r in radii]
    return np.stack([np.stack(frames, -1)] * 3, 2).astype(np.uint8)


def test_clinical_quantities_of_a_new_scan(tmp_path):
    """ED and ES are the largest and the smallest LV; the figures are those of the label map that was written."""
    write(tmp_path / "cine.nii.gz", cine(48, 72, 60, 42, None), np.diag([1.5, 1.5, 8, 1]))
    segment(tmp_path / "cine.nii.gz", tmp_path / "out", volumes=True)
    (row,) = csv.DictReader((tmp_path / "out/volumes.csv").open())
    assert (row["ED"], row["ES"]) == ("1", "3")
    seg = read(tmp_path / "out/cine_seg.nii.gz")
    ml = {
        (phase, name): (seg[..., frame] == label).sum() * 1.5 * 1.5 * 8 / 1000
        for phase, frame in (("ED", 1), ("ES", 3))
        for label, name in enumerate(MMS.class_names)
    }
    for name, (value, unit) in MMS.clinical(ml).items():
        assert float(row[f"{name} ({unit})"]) == pytest.approx(value)


@pytest.mark.parametrize(("labels", "phases", "remark"), [
    (cine(48, 72, 60, 0, None, None), (1, 0), "frames 3, 4, 5 .* without LV, are left out$"),
    (cine(60, None), (None, None), "frames 1 .*; fewer than two frames .* no clinical figures"),
    (cine(60)[..., 0], (None, None), "fewer than two frames .* no clinical figures"),
])  # fmt: skip
def test_frames_that_are_none_have_no_clinical_quantities(labels, phases, remark):
    figures, said = clinical_figures(Volume(labels, None, np.eye(4), (1.5, 1.5, 8.0)), labels, MMS)
    assert (figures["ED"], figures["ES"]) == phases and re.search(remark, said)
    assert (figures["LV EF (%)"] is None) == (phases[0] is None)
