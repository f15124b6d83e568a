"""Augmentation against NumPy, SciPy, scikit-image, torchvision and the released fixture."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import FIXTURES
from scipy import ndimage
from skimage.exposure import match_histograms
from torchvision.transforms.functional import gaussian_blur as torchvision_blur
from torchvision.transforms.functional import resize

from config import MMS
from utils.data.prepared import quantile_curves
from utils.method.augment import (
    CANVAS_PX,
    FIELD_PX,
    Augmentation,
    amplitude_mix,
    amplitude_swap,
    canvas_to_view,
    cutmix_mask,
    fourier_view,
    gaussian_blur,
    match_histogram,
    random_affine,
    random_intensity,
    random_partner,
)

PLAIN = replace(MMS, image_size=64, rotation=0, max_shift=0, flip=False, blur=False)
EVERYTHING = {"rotation": 90, "max_shift": 6, "flip": True, "blur": True}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=seeded(seed))


def smooth(count, *, seed=0, sigma=6):
    """Smooth random canvases in [0, 1], (count, 1, CANVAS_PX, CANVAS_PX)."""
    white = np.random.default_rng(seed).normal(size=(count, CANVAS_PX, CANVAS_PX))
    images = ndimage.gaussian_filter(white, (0, sigma, sigma))
    low, high = images.min((1, 2), keepdims=True), images.max((1, 2), keepdims=True)
    return torch.from_numpy((images - low) / (high - low)).float()[:, None]


def numpy_view(image, other, ratio, half=None):
    """Amplitudes mixed within a window of half-width `half`, or everywhere."""
    spectrum = np.fft.fftshift(np.fft.fft2(image))
    amplitude, other = np.abs(spectrum), np.abs(np.fft.fftshift(np.fft.fft2(other)))
    row, column = (n // 2 for n in image.shape)
    window = np.s_[:] if half is None else np.s_[row - half : row + half + 1, column - half : column + half + 1]
    amplitude[window] = (1 - ratio) * amplitude[window] + ratio * other[window]
    return np.fft.ifft2(np.fft.ifftshift(amplitude * np.exp(1j * np.angle(spectrum)))).real


def centroid(image):
    """Centre of mass in shares of the image size, (row, column)."""
    return (np.array(ndimage.center_of_mass(np.asarray(image))) + 0.5) / image.shape


# --- Fourier views


def test_released_fourier_views():
    with np.load(FIXTURES / "fourier.npz") as file:
        released = {key: torch.from_numpy(file[key])[None, None] for key in file}
    pair = released["source"], released["other"]
    views = {
        "amplitude_swap_L001": amplitude_swap(*pair, 0.01, 1.0),
        "amplitude_swap_L005_ratio08": amplitude_swap(*pair, 0.05, 0.8),
        "amplitude_mix_027": amplitude_mix(*pair, 0.27),
    }
    for name, view in views.items():
        torch.testing.assert_close(view, released[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize(("shape", "half"), [((48, 48), 4), ((47, 47), 4), ((40, 61), 4), ((61, 40), 4), ((9, 11), 0)])
def test_amplitude_swap_equals_numpy(shape, half):
    image, other = noise(3, 1, *shape), noise(3, 1, *shape, seed=1)
    ratio = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1)
    view = amplitude_swap(image, other, 0.1, ratio)
    for i in range(3):
        expected = numpy_view(image[i, 0].numpy(), other[i, 0].numpy(), ratio[i].item(), half)
        np.testing.assert_allclose(view[i, 0], expected, atol=1e-5)
        same_ratio = amplitude_swap(image[i : i + 1], other[i : i + 1], 0.1, ratio[i].item())
        torch.testing.assert_close(same_ratio[0], view[i])
    torch.testing.assert_close(view[0], image[0])
    with pytest.raises(ValueError, match=f"exceeds {shape[0]}x{shape[1]} px"):
        amplitude_swap(image, other, 0.6, 1.0)


def test_amplitude_mix_equals_numpy():
    image, other, ratio = noise(2, 1, 31, 40), noise(2, 1, 31, 40, seed=1), torch.tensor([0.0, 0.3])
    view = amplitude_mix(image, other, ratio.view(2, 1, 1, 1))
    for i in range(2):
        expected = numpy_view(image[i, 0].numpy(), other[i, 0].numpy(), ratio[i].item())
        np.testing.assert_allclose(view[i, 0], expected, atol=1e-5)
    torch.testing.assert_close(view[0], image[0])


def test_fourier_views_of_a_zero_image_are_finite():
    zero, other = torch.zeros(1, 1, 32, 32), noise(1, 1, 32, 32)
    for pair in ((zero, other), (other, zero)):
        assert amplitude_swap(*pair, 0.1, 1.0).isfinite().all()
        assert amplitude_mix(*pair, 0.3).isfinite().all()


@pytest.mark.parametrize(
    ("size", "share", "half"), [(78, 0.15625, 45), (288, 0.01, 2), (96, 0.01, 2), (93, 0.15625, 45)]
)
def test_the_window_is_not_cut_by_rounding(size, share, half):
    """floor(288 L) coefficients at every size; beyond them the amplitude is the image's own."""
    image, other = noise(2, 1, 1, size, size)
    if 2 * half + 1 > size:
        with pytest.raises(ValueError, match=f"a square of {2 * half + 1} coefficients exceeds {size}x{size} px"):
            fourier_view(image, other, mode="AS", window=share, ratio=1.0)
        return
    view = fourier_view(image, other, mode="AS", window=share, ratio=1.0)
    changed = (torch.fft.fft2(view).abs() - torch.fft.fft2(image).abs()).abs()[0, 0, 0] > 1e-3
    frequencies = torch.fft.fftfreq(size, 1 / size).abs()[changed]
    assert frequencies.max() == half


# --- intensity


def quantiles(image):
    curves = np.quantile(image.flatten(1).numpy(), np.linspace(0, 1, 256), axis=1)
    return torch.from_numpy(curves.T.astype(np.float32, order="C"))


def test_match_histogram_equals_scikit_image():
    image, reference = smooth(3), smooth(3, seed=1) ** 2
    image[1] = (image[1] - 0.4).clamp_min(0)  # a background of zeros, a third of the image
    reference[2] = (reference[2] - 0.3).clamp_min(0)
    matched = match_histogram(image, quantiles(image), quantiles(reference))
    for i in range(3):
        expected = match_histograms(image[i, 0].numpy(), reference[i, 0].numpy())
        assert np.abs(matched[i, 0].numpy() - expected).mean() < 1e-3, i
        assert np.abs(image[i, 0].numpy() - expected).mean() > 0.05, i  # there was something to match


def test_match_histogram_leaves_constant_images_as_they_are():
    constant, reference = torch.full((3, 1, 20, 20), 0.3), quantiles(smooth(1))
    constant[1] = 0
    constant[2, 0, 3, 4] = 0.5  # not constant
    matched = match_histogram(constant, quantiles(constant), reference)
    assert torch.equal(matched[:2], constant[:2])
    assert matched[2, 0, 3, 4] == reference[0, -1]
    assert (match_histogram(smooth(1), reference, quantiles(constant[:1])) - 0.3).abs().max() < 1e-6


def test_gaussian_blur_equals_torchvision():
    image, sigma = noise(4, 1, 30, 41), torch.tensor([0.05, 0.25, 0.8, 1.25])
    blurred = gaussian_blur(image, sigma)
    for i in range(4):
        torch.testing.assert_close(blurred[i], torchvision_blur(image[i], [5, 5], [sigma[i].item()]))


def test_random_intensity_equals_numpy_image_by_image():
    image, generator, one = 1.2 * noise(3, 1, 20, 24) - 0.1, seeded(5), (3, 1, 1, 1)
    draws = [torch.rand(one, generator=generator).flatten() for _ in range(3)]
    coil = 0.25 * torch.randn(3, 1, 3, 3, generator=generator)
    made = random_intensity(image, seeded(5))
    for i, (gamma, contrast, brightness) in enumerate(zip(*(d.tolist() for d in draws), strict=True)):
        view = np.clip(image[i, 0].numpy(), 0, 1) ** np.exp(1.4 * gamma - 0.7)
        view = view.mean() + (view - view.mean()) * (0.6 + 0.9 * contrast) + 0.3 * brightness - 0.15
        factor = np.exp(F.interpolate(coil[i : i + 1], size=[20, 24], mode="bicubic", align_corners=True)[0, 0].numpy())
        np.testing.assert_allclose(made[i, 0], view * factor, rtol=0, atol=2e-5)
        for rows, row in ((0, 0), (1, -1)):  # the factor's corners are those of its grid
            assert factor[row, 0] == pytest.approx(np.exp(coil[i, 0, 2 * rows, 0].item()), rel=1e-5)
    assert torch.isfinite(random_intensity(torch.zeros(4, 1, 32, 32), seeded())).all()  # an empty slice


# --- geometry


def test_grid_of_288_is_the_centre_of_the_canvas():
    image, label = smooth(2), torch.randint(0, 4, (2, 1, CANVAS_PX, CANVAS_PX), generator=seeded(), dtype=torch.uint8)
    torch.testing.assert_close(canvas_to_view(image, FIELD_PX), image[..., 6:-6, 6:-6], rtol=0, atol=1e-4)
    view = canvas_to_view(label, FIELD_PX)
    assert view.dtype == torch.uint8 and torch.equal(view, label[..., 6:-6, 6:-6])


def test_field_of_view_is_the_centre_of_its_width():
    """Of 200 px: at its own size the canvas itself, smaller as torchvision resizes it, turned about the middle."""
    image, label = smooth(2), torch.randint(0, 4, (2, 1, CANVAS_PX, CANVAS_PX), generator=seeded(), dtype=torch.uint8)
    torch.testing.assert_close(canvas_to_view(image, 200, field=200), image[..., 50:-50, 50:-50], rtol=0, atol=1e-4)
    assert torch.equal(canvas_to_view(label, 200, field=200), label[..., 50:-50, 50:-50])
    expected = resize(image, [150, 150], antialias=True)[..., 25:-25, 25:-25]
    torch.testing.assert_close(canvas_to_view(image, 100, field=200), expected, rtol=0, atol=1e-3)
    quarter = torch.tensor([[[0.0, -1, 0], [1, 0, 0]]])
    turned = canvas_to_view(image, 200, quarter, field=200)
    torch.testing.assert_close(turned, image[..., 50:-50, 50:-50].rot90(1, (-2, -1)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [64, 96, 144, 288])
def test_grid_keeps_the_field_of_view(size):
    blob = torch.zeros(1, 1, CANVAS_PX, CANVAS_PX)
    blob[..., 80:121, 180:201] = 1
    expected = (np.array([100.5, 190.5]) - 6) / FIELD_PX  # centre of the blob's rectangle, in the field of view
    view = canvas_to_view(blob, size)[0, 0]
    np.testing.assert_allclose(centroid(view), expected, atol=0.3 / size)
    assert view.mean().item() == pytest.approx(41 * 21 / FIELD_PX**2, rel=0.1)
    assert torch.equal(canvas_to_view(blob.to(torch.uint8), size)[0, 0] == 1, view > 0.5)
    assert (canvas_to_view(torch.full((1, 1, CANVAS_PX, CANVAS_PX), 0.7), size) - 0.7).abs().max() < 1e-5


def test_small_grid_is_antialiased():
    checkerboard = torch.from_numpy(np.indices((CANVAS_PX, CANVAS_PX)).sum(0) % 2).float()[None, None]
    inner = canvas_to_view(checkerboard, 64)[..., 1:-1, 1:-1]
    assert (inner - 0.5).abs().max() < 0.05


@pytest.mark.parametrize("angle", [0, 30, 45, 90])
def test_rotation_equals_scipy(angle, monkeypatch):
    monkeypatch.setattr(torch, "randint", lambda low, high, size, **_: torch.full(size, angle if high == 91 else 0))
    theta = random_affine(1, generator=seeded(), rotation=90, max_shift=0, flip=False)
    monkeypatch.undo()
    image = smooth(1)
    view = canvas_to_view(image, FIELD_PX, theta)[0, 0].numpy()
    rotated = ndimage.rotate(image[0, 0].numpy(), angle, reshape=False, order=1)[6:-6, 6:-6]
    # Inside this disc, the canvas is visible at any angle.
    disc = np.hypot(*(np.indices((FIELD_PX, FIELD_PX)) - (FIELD_PX - 1) / 2)) < 140
    assert np.abs(view - rotated)[disc].max() < 1e-3


def test_angles_are_all_integers_from_0_to_90():
    theta = random_affine(4000, generator=seeded(), rotation=90, max_shift=0, flip=False)
    angle = torch.atan2(theta[:, 1, 0], theta[:, 0, 0]).rad2deg()
    assert (angle - angle.round()).abs().max() < 1e-3
    assert set(angle.round().int().tolist()) == set(range(91))
    torch.testing.assert_close(theta[:, :, :2].det(), torch.ones(4000))  # no shear, no zoom


def test_shifts_are_whole_px_within_the_window():
    theta = random_affine(2000, generator=seeded(), rotation=0, max_shift=6, flip=False)
    shift = theta[:, :, 2] * CANVAS_PX / 2
    assert (shift - shift.round()).abs().max() < 1e-3
    for axis in (0, 1):
        assert set(shift[:, axis].round().int().tolist()) == set(range(-6, 7))
    image = smooth(1)
    for i in range(3):
        x, y = shift[i].round().int().tolist()
        view = canvas_to_view(image, FIELD_PX, theta[i : i + 1])
        torch.testing.assert_close(view, image[..., 6 + y : 294 + y, 6 + x : 294 + x], rtol=0, atol=1e-4)


def test_flips_are_independent_and_mirror_the_field_of_view():
    theta = random_affine(400, generator=seeded(), rotation=0, max_shift=0, flip=True)
    signs = theta[:, (0, 1), (0, 1)].sign().int()
    counts = [(signs == torch.tensor(pair)).all(1).sum().item() for pair in ((1, 1), (1, -1), (-1, 1), (-1, -1))]
    assert min(counts) > 70  # 100 expected, standard deviation 9
    image = smooth(1)
    for i in range(8):
        axes = [axis for axis, sign in ((-1, signs[i, 0]), (-2, signs[i, 1])) if sign < 0]
        expected = image[..., 6:-6, 6:-6].flip(axes)
        torch.testing.assert_close(canvas_to_view(image, FIELD_PX, theta[i : i + 1]), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [64, FIELD_PX])
def test_image_and_mask_stay_aligned(size):
    mask = (smooth(6, sigma=25) > 0.5).to(torch.uint8)
    augmentation = Augmentation(replace(PLAIN, image_size=size, rotation=90, max_shift=6, flip=True))
    image_view, mask_view = augmentation.labeled(mask.float(), mask, torch.zeros(6, 256), seeded())
    assert image_view.shape == (6, 1, size, size) and image_view.dtype == torch.float32
    assert mask_view.shape == (6, size, size) and mask_view.dtype == torch.int64
    # Away from the mask's edge, and from the view's, the image is the mask; a px of displacement would show.
    inside, box = mask_view.bool(), np.ones((1, 3, 3))
    core = ndimage.binary_erosion(inside, box)
    outside = ndimage.binary_erosion(~inside, box)
    assert core.mean() > 0.1 and image_view[:, 0].numpy()[core].min() > 0.85
    assert outside.mean() > 0.1 and image_view[:, 0].numpy()[outside].max() < 0.15


# --- CutMix and partners


def test_cutmix_of_one_box_is_a_rectangle_of_the_stated_area():
    masks = cutmix_mask(300, 240, generator=seeded(), boxes=1)
    assert masks.shape == (300, 1, 240, 240) and set(masks.unique().tolist()) == {0, 1}
    masks = masks[:, 0].bool().numpy()
    rows, columns = masks.any(2), masks.any(1)
    assert (masks == rows[:, :, None] & columns[:, None, :]).all()  # the product ...
    for side in (rows, columns):
        assert (np.count_nonzero(np.diff(side, prepend=False, append=False), axis=1) == 2).all()  # ... of two intervals
    shares, heights = masks.mean((1, 2)), rows.mean(1)
    assert 0.25 - 0.005 < min(shares) < 0.27 and 0.48 < max(shares) < 0.5 + 0.005
    assert np.mean(shares) == pytest.approx(0.375, abs=0.02)
    # height = a^u: its logarithm is uniform, the median is E[sqrt(a)], about 0.61
    assert np.median(heights) == pytest.approx(0.61, abs=0.05) and max(heights) > 0.97
    # Boxes lie anywhere inside: one cut off at the border would be smaller than its share.
    for edge in (rows[:, 0], rows[:, -1], columns[:, 0], columns[:, -1]):
        assert 0 < edge.mean() < 0.5


def test_cutmix_toggles_three_boxes():
    mask = cutmix_mask(2000, 64, generator=seeded())
    assert set(mask.unique().tolist()) == {0, 1}
    # Independent boxes of mean area 0.125 (0.375 / 3): at most 0.375 is covered, overlaps of two go back to 0.
    assert 0.25 < mask.mean().item() < 0.36
    assert torch.equal(mask, cutmix_mask(2000, 64, generator=seeded()))
    assert not torch.equal(mask, cutmix_mask(2000, 64, generator=seeded(1)))


@pytest.mark.parametrize("boxes", [1, 2, 3])
def test_cutmix_boxes_on_each_other_cancel(monkeypatch, boxes):
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, 0.5))
    share = cutmix_mask(1, 200, generator=seeded(), boxes=boxes).mean().item()
    assert share == pytest.approx(0.375 / boxes if boxes % 2 else 0, abs=0.01)


@pytest.mark.parametrize("count", range(2, 21))
def test_partners_are_a_permutation_without_fixed_points(count):
    identity = list(range(count))
    drawn = {tuple(random_partner(count, seeded(seed)).tolist()) for seed in range(30)}
    for partner in drawn:
        assert sorted(partner) == identity
        assert all(i != p for i, p in enumerate(partner))
    assert len(drawn) > (1 if count > 2 else 0)


# --- the views of training


def unlabeled(image, *, seed=0, reference=None, **settings):
    augmentation = Augmentation(replace(PLAIN, **settings), reference)
    curves = torch.from_numpy(np.ascontiguousarray(quantile_curves(image[:, 0].half().numpy())))
    return augmentation.unlabeled(image, curves, seeded(seed))


@pytest.mark.parametrize("mode", ["AS", "AM"])
def test_unlabeled_views(mode):
    settings = EVERYTHING | {"fourier_mode": mode, "reference": quantiles(smooth(3, seed=7))}
    image = smooth(4)
    plain, fourier = unlabeled(image, **settings)
    assert plain.shape == fourier.shape == (4, 1, 64, 64) and plain.dtype == fourier.dtype == torch.float32
    assert (plain - fourier).abs().mean() > 0.003
    again, other = unlabeled(image, **settings), unlabeled(image, seed=1, **settings)
    assert torch.equal(plain, again[0]) and torch.equal(fourier, again[1])
    assert not torch.equal(plain, other[0])
    assert unlabeled(image, fourier_aug=False, cps_loss="plain", **settings)[1] is None


def test_a_share_of_the_images_to_learn_on_changes_its_gray_values():
    image, masks = smooth(64), torch.zeros(64, 1, CANVAS_PX, CANVAS_PX, dtype=torch.uint8)
    views = {share: Augmentation(replace(PLAIN, intensity_aug=share)).labeled(image, masks, None, seeded())[0]
             for share in (0, 0.25, 1)}  # fmt: skip
    changed = [((views[share] - views[0]).abs().amax((1, 2, 3)) > 0).float().mean().item() for share in (0.25, 1)]
    assert 0.1 < changed[0] < 0.4 and changed[1] == 1


@pytest.mark.parametrize("off", [{"fourier_ratio": 0.0}, {"fourier_mode": "AM", "fourier_alpha": 0.0}])
def test_fourier_view_of_ratio_0_is_the_plain_view(off):
    plain, fourier = unlabeled(smooth(4), reference=quantiles(smooth(3, seed=7)), **EVERYTHING | off)
    torch.testing.assert_close(fourier, plain, rtol=0, atol=1e-5)


def low_amplitude(view, half=2):
    window = slice(32 - half, 33 + half)
    return torch.fft.fftshift(torch.fft.fft2(view), dim=(-2, -1))[..., window, window].abs()


def test_partner_takes_the_geometry_of_its_image():
    """The partner is the image doubled: in the image's own geometry, the low amplitudes double exactly."""
    image = smooth(1).expand(2, 1, CANVAS_PX, CANVAS_PX) * torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    plain, fourier = unlabeled(image, rotation=90, max_shift=6, flip=True)
    assert (low_amplitude(plain[1]) / low_amplitude(plain[0]) - 2).abs().max() > 0.1  # their geometries differ
    for i, factor in enumerate((2.0, 0.5)):
        torch.testing.assert_close(low_amplitude(fourier[i]), factor * low_amplitude(plain[i]), rtol=2e-3, atol=1e-2)


def test_partner_is_not_histogram_matched():
    """Only the plain view follows the reference: the partner's amplitudes come from the batch as it was."""
    image = smooth(2)
    reference = quantiles(0.1 * smooth(1, seed=7))
    plain, fourier = unlabeled(image, reference=reference)
    unmatched, _ = unlabeled(image)
    assert plain.max() < 0.11
    torch.testing.assert_close(low_amplitude(fourier[0]), low_amplitude(unmatched[1]), rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize("size", [48, 64, 72, 80, 128, 144])
def test_small_masks_lie_where_the_image_does(size):
    """The largest share of a pixel decides, at sizes whose samples fall on exact halves, too: no shift of the mask."""
    rows, columns = torch.meshgrid(torch.arange(CANVAS_PX), torch.arange(CANVAS_PX), indexing="ij")
    distance = ((rows - 140.3) ** 2 + (columns - 155.2) ** 2).sqrt()[None, None]
    mask = ((distance < 40).int() + 2 * ((distance >= 40) & (distance < 55)).int()).to(torch.uint8)
    theta = random_affine(1, generator=seeded(3), rotation=90, max_shift=6, flip=True)
    for affine in (None, theta):
        view = canvas_to_view(mask, size, affine, num_classes=4)
        assert torch.equal(view, canvas_to_view(mask, size, affine))  # the number of classes read off the mask
        shares = torch.cat([canvas_to_view((mask == label).float(), size, affine) for label in range(3)], dim=1)
        assert torch.equal(view[:, 0], shares.argmax(1).to(torch.uint8))
        np.testing.assert_allclose(centroid((view == 1).float()[0, 0]), centroid(shares[0, 1]), atol=0.12 / size)
