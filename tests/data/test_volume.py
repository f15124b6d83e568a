"""Damaged and odd NIfTI files made byte by byte, and the way to the canvas and back against SciPy."""

import gzip
import time
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from utils.data.volume import PlaneMap, Volume, read_header, read_volume, write_volume
from utils.errors import UserError
from utils.plots import edge_letters, radiological

DATA = np.random.default_rng(0).integers(-500, 500, (7, 6, 5)).astype(np.int16)
OBLIQUE = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.3, -0.2, 0.4) @ np.diag([1.25, 1.5, 8.0]), [-90, 40, 12])


def nifti(array=DATA, affine=OBLIQUE, *, image=nib.Nifti1Image, sform=1, qform=1, **fields):
    """The bytes of a NIfTI file; header fields are set behind nibabel's back, which would not write some of them."""
    made = image(array, affine)
    made.set_sform(affine, sform)
    made.set_qform(affine, qform)
    content = bytearray(made.to_bytes())
    dtype = made.header.template_dtype
    header = np.frombuffer(content, dtype, 1)[0]
    for field, value in fields.items():
        header[field] = value
    return bytes(content)


def save(tmp_path, content, name="scan.nii"):
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def dims(*shape):
    return [len(shape), *shape, *[1] * (7 - len(shape))]


def with_nan(value):
    array = DATA.astype(np.float32)
    array[3, 3, 3] = value
    return array


def flipped(content, position):
    content = bytearray(content)
    content[position] ^= 0xFF
    return bytes(content)


GZ = gzip.compress(nifti())
RGB = np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
REFUSED = {  # name: (bytes, file name, what the message says)
    "gzip cut in its data": (GZ[: len(GZ) // 2], "scan.nii.gz", "cannot be read whole"),
    "gzip with a wrong checksum": (flipped(GZ, -6), "scan.nii.gz", "cannot be read whole"),
    "gzip, then garbage": (GZ + b"garbage", "scan.nii.gz", "cannot be read whole"),
    "short data": (nifti()[:-1], "scan.nii", "bytes"),
    "short data in a whole gzip": (gzip.compress(nifti()[:-1]), "scan.nii.gz", "promises"),
    "header cut": (nifti()[:200], "scan.nii", "not a NIfTI"),
    "empty": (b"", "scan.nii", "not a NIfTI"),
    "text": (b"patient;vendor\n" * 100, "scan.nii", "not a NIfTI"),
    "header of a pair": (nifti(magic=b"ni1"), "scan.nii", "single-file"),
    "zero dimension": (nifti(dim=dims(7, 0, 5)), "scan.nii", "impossible dimensions"),
    "negative dimension": (nifti(dim=dims(7, -6, 5)), "scan.nii", "impossible dimensions"),
    "2D": (nifti(DATA[:, :, 0]), "scan.nii", r"2D image of shape \[7, 6\], expected at least 3D"),
    "5D": (nifti(np.stack([DATA[..., None]] * 2, -1)), "scan.nii", "5D image"),
    "NaN pixdim": (nifti(pixdim=[1, 1.25, np.nan, 8, 1, 1, 1, 1]), "scan.nii", "voxel size"),
    "zero pixdim": (nifti(pixdim=[1, 0, 1.5, 8, 1, 1, 1, 1]), "scan.nii", "voxel size"),
    "negative pixdim": (nifti(pixdim=[1, 1.25, 1.5, -8, 1, 1, 1, 1]), "scan.nii", "voxel size"),
    "NaN affine": (nifti(srow_y=[0, np.nan, 0, 0]), "scan.nii", "affine"),
    "affine beyond the earth": (nifti(srow_z=[0, 0, 0.5, 1e9]), "scan.nii", "beyond 1 km"),
    "singular affine": (nifti(srow_z=[0, 0, 0, 5]), "scan.nii", "affine"),
    "NaN voxel": (nifti(with_nan(np.nan)), "scan.nii", "1 voxels are NaN, infinite or above"),
    "infinite voxel": (nifti(with_nan(-np.inf)), "scan.nii", "1 voxels are NaN, infinite or above"),
    "beyond float32": (nifti(scl_slope=1e38), "scan.nii", r"voxels are .* above 1e\+30 \(scaled by"),
    "RGB": (nifti(RGB), "scan.nii", "one number per voxel|type"),
    "unknown datatype": (nifti(datatype=77), "scan.nii", "not a valid"),
    "NaN offset": (nifti(vox_offset=np.nan), "scan.nii", "header"),
    "gzip with damaged data": (flipped(GZ, len(GZ) // 2), "scan.nii.gz", "cannot be read whole"),
    "offset beyond the file": (nifti(vox_offset=5000), "scan.nii", "header|promises"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_damaged_file_is_refused_by_name(tmp_path, name):
    content, file_name, message = REFUSED[name]
    path = tmp_path / file_name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_volume(path)
    assert str(path) in str(error.value)
    for path in (tmp_path / "absent.nii.gz", tmp_path):
        with pytest.raises(UserError, match=f"{path} cannot be read"):
            read_volume(path)


NOISE = np.random.default_rng(0).integers(-32768, 32767, (100, 100, 20)).astype(np.int16)  # does not compress
HUGE = {
    "nifti1": (nifti(dim=dims(32000, 32000, 32000)), "scan.nii"),
    "nifti1 gz": (nifti(dim=dims(32000, 32000, 32000)), "scan.nii.gz"),
    "nifti2": (nifti(image=nib.Nifti2Image, dim=dims(2**40, 2**20, 2)), "scan.nii"),
    "overflowing 64 bits": (nifti(image=nib.Nifti2Image, dim=dims(2**40, 2**40, 2)), "scan.nii.gz"),
    "as dense as gzip can be": (nifti(NOISE, dim=dims(1900, 1000, 100)), "scan.nii.gz"),  # 380 MB from 0.4 MB
}


@pytest.mark.parametrize("name", HUGE)
def test_claim_of_a_huge_volume_is_answered_at_once(tmp_path, name):
    path = save(tmp_path, *HUGE[name])
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(UserError, match="promises" if name == "as dense as gzip can be" else "claims"):
        read_volume(path)
    seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 0.8 and peak < 50e6


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
@pytest.mark.parametrize("image", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("shape", [(7, 6, 5), (7, 6, 1), (7, 3, 5, 2)])
def test_good_file_is_read(tmp_path, name, image, shape):
    array = DATA.ravel()[: np.prod(shape)].reshape(shape)
    path = save(tmp_path, nifti(array, image=image), name)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_allclose(volume.affine, OBLIQUE, atol=1e-5)
    assert volume.zooms == pytest.approx((1.25, 1.5, 8.0)) and not volume.warning
    assert read_header(path)[1] == shape


def big_endian():
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    return nib.Nifti1Image(DATA, OBLIQUE, header).to_bytes()


ODD_FILES = {  # packing is known by the content
    "packed.nii": GZ,
    "plain.nii.gz": nifti(),
    "UPPER.NII.GZ": GZ,
    "big_endian.nii": big_endian(),
    "members_and_padding.nii.gz": gzip.compress(nifti()[:400]) + gzip.compress(nifti()[400:]) + bytes(512),
    "scaled.nii": nifti(2 * DATA + 6, scl_slope=0.5, scl_inter=-3),
}


@pytest.mark.parametrize("name", ODD_FILES)
def test_odd_file_is_read(tmp_path, name):
    (tmp_path / name).write_bytes(ODD_FILES[name])
    np.testing.assert_array_equal(read_volume(tmp_path / name).array, DATA)


def test_trailing_axes_of_length_1_are_dropped(tmp_path):
    path = save(tmp_path, nifti(DATA[..., None, None]), "scan.nii.gz")
    volume = read_volume(path, 3)
    np.testing.assert_array_equal(volume.array, DATA)
    assert read_header(path)[1] == DATA.shape
    write_volume(tmp_path / "label.nii", (DATA > 0).astype(np.uint8), like=volume)
    assert read_volume(tmp_path / "label.nii", 3).zooms == volume.zooms


def test_no_text_of_the_scan_is_copied(tmp_path):
    scan = nib.Nifti1Image(DATA, OBLIQUE)
    scan.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"DOE^JANE"))
    for field in ("db_name", "aux_file", "intent_name", "descrip"):
        scan.header[field] = b"DOE^JANE"
    nib.save(scan, tmp_path / "scan.nii")
    write_volume(tmp_path / "label.nii", DATA, like=read_volume(tmp_path / "scan.nii"), description="ours")
    content = (tmp_path / "label.nii").read_bytes()
    assert b"DOE" in (tmp_path / "scan.nii").read_bytes() and b"DOE" not in content and b"ours" in content
    np.testing.assert_array_equal(read_volume(tmp_path / "label.nii").array, DATA)
    assert len(content) == 352 + DATA.nbytes


@pytest.mark.parametrize(("zoom", "warns"), [(1.255, False), (1.2875, True), (1.0, True)])
def test_warning_when_voxel_size_and_affine_disagree(tmp_path, zoom, warns):
    volume = read_volume(save(tmp_path, nifti(pixdim=[1, zoom, 1.5, 8, 1, 1, 1, 1])))
    assert bool(volume.warning) == warns
    if warns:
        assert "1.25" in volume.warning and str(zoom) in volume.warning
    assert volume.zooms[0] == pytest.approx(zoom)  # spacing is the header's


SKEWED = OBLIQUE + np.array([[0, 0.3, 0, 0]] + [[0.0] * 4] * 3)  # columns that are not orthogonal


@pytest.mark.parametrize("name", ["out.nii", "out.nii.gz"])
@pytest.mark.parametrize("image", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize(("affine", "codes"), [
    (OBLIQUE, {"qform": 1, "sform": 0}),
    (OBLIQUE * [-1, 1, 1, 1], {"qform": 2, "sform": 0}),  # left-handed: qfac -1
    (SKEWED, {"qform": 0, "sform": 2}),
    (OBLIQUE, {"qform": 1, "sform": 1}),
    (OBLIQUE, {"qform": 0, "sform": 0}),
], ids=["qform", "qform mirrored", "skewed sform", "both", "neither"])  # fmt: skip
def test_written_volume_lies_in_the_grid_of_the_scan(tmp_path, name, image, affine, codes):
    """A label is written for a scaled 4D scan: geometry to the bit, values and type its own."""
    scan = np.stack([DATA, DATA], axis=3)
    content = nifti(scan, affine, image=image, **codes, scl_slope=0.5, scl_inter=3, cal_max=900, xyzt_units=10)
    like = read_volume(save(tmp_path, content))
    label = (np.arange(DATA.size).reshape(DATA.shape) % 4).astype(np.uint8)
    write_volume(tmp_path / "new" / name, label, like)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]
    source, written = nib.load(tmp_path / "scan.nii"), nib.load(tmp_path / "new" / name)
    assert type(written) is image and written.get_data_dtype() == np.uint8 and written.shape == DATA.shape
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), label)
    np.testing.assert_array_equal(written.affine, source.affine)
    for field in ("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y",
                  "qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units"):  # fmt: skip
        np.testing.assert_array_equal(written.header[field], source.header[field], err_msg=field)
    np.testing.assert_array_equal(written.header["pixdim"][:4], source.header["pixdim"][:4])
    assert written.header["cal_max"] == 0
    np.testing.assert_array_equal(read_volume(tmp_path / "new" / name).array, label)


# --- native plane and canvas


ODD = [((217, 256), (1.5, 1.5)), ((187, 201), (0.7, 0.9)), ((255, 131), (1.0, 2.0)), ((97, 151), (1.8, 1.13))]


@pytest.mark.parametrize("center", [None, (40.0, 61.5)])
@pytest.mark.parametrize(("shape", "zooms"), ODD)
def test_bilinear_equals_scipy_and_the_outside_is_zero(shape, zooms, center):
    rng, plane = np.random.default_rng(0), PlaneMap(shape, zooms, 160, 1.1, center)
    native, canvas = (rng.uniform(0.5, 1, s).astype(np.float32) for s in (shape, (160, 160)))
    middle = center or [(n - 1) / 2 for n in shape]
    to_native = [(np.arange(160) - 79.5) * 1.1 / z + m for z, m in zip(zooms, middle, strict=True)]
    to_canvas = [(np.arange(n) - m) * z / 1.1 + 79.5 for n, z, m in zip(shape, zooms, middle, strict=True)]
    for source, result, positions in (
        (native, plane.to_canvas(native), to_native),
        (canvas, plane.to_native(canvas), to_canvas),
    ):
        grid = np.array(np.meshgrid(*positions, indexing="ij"))
        last = np.reshape(source.shape, (2, 1, 1)) - 1
        expected = ndimage.map_coordinates(source.astype(float), grid, order=1, mode="nearest")
        inside = ((grid >= 0) & (grid <= last)).all(0)
        outside = ((grid < -0.501) | (grid > last + 0.501)).any(0)
        assert inside.mean() > 0.2
        np.testing.assert_allclose(result[inside], expected[inside], atol=1e-4)
        assert (result[outside] == 0).all()
    label = (native * 255).astype(np.uint8)
    expected = ndimage.map_coordinates(label, np.meshgrid(*to_native, indexing="ij"), order=0, mode="constant")
    assert (plane.to_canvas(label) == expected).mean() > 0.98  # but for ties and the outer half voxel


def test_inside_names_the_voxels_on_the_canvas():
    x, y = (np.abs(np.arange(n) - (n - 1) / 2) * z <= 55 for n, z in ((301, 1.0), (120, 1.3)))
    inside = PlaneMap((301, 120), (1.0, 1.3), 100, 1.1).inside()
    assert inside.dtype == bool and np.array_equal(inside, x[:, None] & y)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAI", "PLS", "ARI", "RSA", "PIR", "SAL"])
def test_pictures_show_the_patient_as_a_radiologist_does(axes):
    """The patient's right lies at the viewer's left, front at the top; head at the top where the plane shows it."""
    codes = nib.orientations.axcodes2ornt(axes)
    affine = np.zeros((4, 4))
    affine[codes[:, 0].astype(int), range(3)] = codes[:, 1]
    affine[3, 3] = 1
    header = nib.Nifti1Header()
    header["sform_code"] = 1
    index = np.stack(np.meshgrid(range(4), range(5), indexing="ij"), -1)  # of the voxels in the plane
    world = index @ affine[:3, :2].T  # (X, Y, 3): to the right, to the front, to the head
    like = Volume(np.zeros((4, 5, 1)), header, affine, (1, 1, 1))
    right, front, head = radiological(np.moveaxis(world, -1, 0), like)
    across, down = (right, front) if head.std() == 0 else (right if front.std() == 0 else front, head)
    assert (np.diff(across, axis=0) == -1).all() and (np.diff(down, axis=1) == -1).all()
    assert edge_letters(like) == ("RL" if across is right else "AP") + ("AP" if down is front else "SI")
    oblique = Rotation.from_euler("xyz", (20, -15, 10), degrees=True).as_matrix()
    tilted = like._replace(affine=np.block([[oblique @ affine[:3, :3], np.zeros((3, 1))], [np.eye(4)[3:]]]))
    assert edge_letters(tilted) == edge_letters(like)
    header["sform_code"] = 0
    assert (radiological(world, like) == world).all() and not edge_letters(like)  # the scan does not say: as stored
