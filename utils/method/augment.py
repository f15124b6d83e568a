"""Batched augmentation on the device: geometry, histograms, Fourier views, blur, CutMix masks.

Everything here works on whole batches in float32 and draws its random numbers from a passed generator.
Images are (B, 1, H, W). Images from `prepare` are canvases, wider than the field of view by a margin for shifts.
Lengths in px (max_shift, blur, Fourier window) are given for a field of view of 288 px, whatever the image size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from config import CANVAS_PX, FIELD_PX, Config

# --- Fourier views (Yao et al. 2022, Fourier-based augmentation)


def amplitude_swap(
    image: torch.Tensor, other: torch.Tensor, window: float, ratio: float | torch.Tensor
) -> torch.Tensor:
    """Give `image` the low-frequency amplitude of `other`, keeping its phase (mode AS).

    Only the (2b+1)^2 Fourier coefficients in the centred square of half-width b = floor(min(H, W) * window)
    change, so they alone are computed, by products with thin bases.

    Args:
        image, other: (B, 1, H, W) float32.
        window: L, the square's half-width as a share of the image size.
        ratio: lambda in [0, 1], the share of the other's amplitude; a number or (B, 1, 1, 1).

    Returns:
        (B, 1, H, W), the real part of the inverse transform.
    """
    height, width = image.shape[-2:]
    half = int(round(min(height, width) * window, 6))  # 44.9999 is 45
    if 2 * half + 1 > min(height, width):
        raise ValueError(f"window {window}: a square of {2 * half + 1} coefficients exceeds {height}x{width} px")
    rows, columns = _fourier_basis(height, half, image.device), _fourier_basis(width, half, image.device)
    # Where one side is real, the complex products are spelt as real ones: half the work.
    spectrum, other_spectrum = (
        rows @ torch.complex(view @ columns.real.T, view @ columns.imag.T) for view in (image, other)
    )  # (B, 1, 2b+1, 2b+1)
    change = ratio * (other_spectrum.abs() - spectrum.abs()) * torch.exp(1j * spectrum.angle())
    left = rows.mH @ change  # (B, 1, H, 2b+1)
    return image + (left.real @ columns.real + left.imag @ columns.imag) / (height * width)


def _fourier_basis(size: int, half: int, device: torch.device) -> torch.Tensor:
    """Rows exp(-2 pi i k x / size) of the DFT matrix for k = -half..half: (2 half + 1, size) complex64."""
    frequency = torch.arange(-half, half + 1, device=device)
    # The product is reduced modulo the size as integers: the angle stays exact.
    turns = (frequency[:, None] * torch.arange(size, device=device)).remainder(size) / size
    return torch.exp(-2j * torch.pi * turns.double()).to(torch.complex64)


def amplitude_mix(image: torch.Tensor, other: torch.Tensor, ratio: float | torch.Tensor) -> torch.Tensor:
    """Mix the whole amplitude spectrum of `image` with that of `other`, keeping its phase (mode AM).

    Args:
        image, other: (B, 1, H, W) float32.
        ratio: l in [0, 1], the share of the other's amplitude; a number or (B, 1, 1, 1).

    Returns:
        (B, 1, H, W), the real part of the inverse transform.
    """
    spectrum = torch.fft.fft2(image)
    amplitude = (1 - ratio) * spectrum.abs() + ratio * torch.fft.fft2(other).abs()
    return torch.fft.ifft2(torch.polar(amplitude, spectrum.angle())).real


def fourier_view(
    image: torch.Tensor, other: torch.Tensor, *, mode: str, window: float, ratio: float | torch.Tensor
) -> torch.Tensor:
    """Return the Fourier view Z of `image`, whose amplitude comes from `other` (Yao et al. 2022, section 3.2).

    Args:
        image, other: (B, 1, H, W) float32 views of the whole field of view.
        mode: "AS" or "AM".
        window: L of mode AS. The window counts cycles per field of view, which smaller images show whole.
        ratio: share of the other's amplitude; a number or (B, 1, 1, 1).
    """
    if mode == "AS":
        return amplitude_swap(image, other, window * FIELD_PX / image.shape[-1], ratio)
    if mode == "AM":
        return amplitude_mix(image, other, ratio)
    raise ValueError(f"unknown Fourier mode {mode!r}")


# --- intensity


def match_histogram(image: torch.Tensor, source: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Match the histogram of each image to a reference, both known by their quantile curves.

    Args:
        image: (B, 1, H, W).
        source: (B, Q) rising quantile curve of each image.
        reference: (B, Q) quantile curves to match, or (1, Q) for one reference.

    Returns:
        (B, 1, H, W): reference quantile at the rank that each pixel has in its own image; a constant image as it is.
    """
    values = image.flatten(1)
    # side="right": a value that many pixels share (the background) takes the highest of their ranks,
    # as scikit-image's match_histograms does.
    upper = torch.searchsorted(source, values, right=True).clamp(1, source.shape[1] - 1)
    low, high = source.gather(1, upper - 1), source.gather(1, upper)
    reference = reference.expand_as(source)
    low_reference, high_reference = reference.gather(1, upper - 1), reference.gather(1, upper)
    fraction = ((values - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    matched = torch.lerp(low_reference, high_reference, fraction)
    constant = source[:, :1] == source[:, -1:]  # every rank is the highest there: an empty slice would turn white
    return torch.where(constant, values, matched).view_as(image)


def gaussian_blur(image: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Blur each image (B, 1, H, W) with its own 5x5 Gaussian of `sigma` (B,) px, mirrored at the border."""
    offsets = torch.arange(-2, 3, device=image.device)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True))[:, :, None, None, None]  # (B, 5, 1, 1, 1)
    for dim in (2, 3):
        padded = F.pad(image, (0, 0, 2, 2) if dim == 2 else (2, 2, 0, 0), mode="reflect")
        image = kernel[:, 0] * padded.narrow(dim, 0, image.shape[dim])
        for i in range(1, 5):
            image.addcmul_(kernel[:, i], padded.narrow(dim, i, image.shape[dim]))
    return image


def random_intensity(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Change the gray values of each image (B, 1, H, W), about 0 to 1, as another scanner might.

    A gamma from 0.5 to 2, contrast and brightness about the mean, and a smooth factor over the field of view, as of a
    receiving coil: the intensity part of the views of Ouyang et al. (IEEE TMI 2023).
    """
    count, options = len(image), {"generator": generator, "device": image.device}

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, 1, **options)

    view = image.clamp(0, 1) ** uniform(-0.7, 0.7).exp()
    mean = view.mean((1, 2, 3), keepdim=True)
    view = (view - mean) * uniform(0.6, 1.5) + mean + uniform(-0.15, 0.15)
    coil = 0.25 * torch.randn(count, 1, 3, 3, **options)
    return view * F.interpolate(coil, size=image.shape[-2:], mode="bicubic", align_corners=True).exp()


# --- geometry


def canvas_to_view(
    canvas: torch.Tensor, size: int, theta: torch.Tensor | None = None, *, field: int = FIELD_PX, num_classes=None
) -> torch.Tensor:
    """Sample the field of view of prepared canvases at `size` px, anti-aliased and bilinear.

    Labels take the class that has the largest share of a pixel, so that they lie where the image does; at the full
    size, where pixels are not merged, the nearest label.

    Args:
        canvas: (B, 1, C, C): float images, or uint8 labels (as the dtype tells).
        size: px of the output.
        theta: (B, 2, 3) affine on normalised coordinates of the field of view; None for the centre crop.
        field: px of the canvas that the field of view is wide.
        num_classes: of labels, including the background; None reads it off them, for which a GPU must be waited for.

    Returns:
        (B, 1, size, size), of the canvas's kind: float32 or uint8. Outside the canvas: 0.
    """
    labels, smaller = canvas.dtype == torch.uint8, size < field
    image = canvas.float()
    if labels and smaller:
        image = F.one_hot(canvas[:, 0].long(), num_classes or int(canvas.max()) + 1).movedim(-1, 1).float()
    if smaller:
        image = F.interpolate(image, size=round(CANVAS_PX * size / field), mode="bilinear", antialias=True)
    if theta is None:
        theta = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]], device=canvas.device)
    theta = torch.cat([theta[..., :2] * (field / CANVAS_PX), theta[..., 2:]], 2)
    grid = F.affine_grid(theta.expand(len(canvas), 2, 3), [len(canvas), 1, size, size], align_corners=False)
    mode = "nearest" if labels and not smaller else "bilinear"
    sampled = F.grid_sample(image, grid, mode=mode, align_corners=False)
    if labels:
        return (sampled.argmax(1, keepdim=True) if smaller else sampled).to(torch.uint8)
    return sampled


def random_affine(count: int, *, generator: torch.Generator, rotation: int, max_shift: int, flip: bool) -> torch.Tensor:
    """Draw affine maps (count, 2, 3) float32 for `canvas_to_view`: turned and mirrored, then moved over the canvas.

    Args:
        rotation: largest angle; the angle is an integer, U{0..rotation} degrees.
        max_shift: px (at 288 px), the largest shift in each direction; shifts are whole px.
        flip: horizontal and vertical flips, each with probability 0.5.
    """
    device = generator.device
    angle = torch.randint(0, rotation + 1, (count,), generator=generator, device=device).deg2rad()
    offset = torch.randint(0, 2 * max_shift + 1, (count, 2), generator=generator, device=device) - max_shift
    sign = 1 - 2 * torch.randint(0, 2, (count, 2), generator=generator, device=device) * flip
    cos, sin = angle.cos(), angle.sin()
    rotate = torch.stack([cos, -sin, sin, cos], dim=1).view(count, 2, 2)
    return torch.cat([rotate * sign[:, None, :], (rotate @ (offset * 2 / CANVAS_PX)[:, :, None])], dim=2)


def cutmix_mask(count: int, size: int, *, generator: torch.Generator, boxes: int = 3) -> torch.Tensor:
    """Draw box masks for CutMix, (count, 1, size, size) float32: 1 where the second image shows.

    Every box toggles the mask inside it.
    """
    device = generator.device
    area, split, top, left = torch.rand(4, count, boxes, generator=generator, device=device)
    area = 0.25 + 0.25 * area
    height_share = torch.exp(split * area.log())
    scale = size * boxes**-0.5
    height, width = (height_share * scale).round(), (area / height_share * scale).round()
    top, left = (top * (size - height)).round(), (left * (size - width)).round()
    position = torch.arange(size, device=device)
    rows = (position >= top[..., None]) & (position < (top + height)[..., None])  # (count, boxes, size)
    columns = (position >= left[..., None]) & (position < (left + width)[..., None])
    inside = rows[:, :, :, None] & columns[:, :, None, :]
    return (inside.sum(dim=1, keepdim=True) % 2).float()


def random_partner(count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw a permutation of `count` indices without fixed points: one random cycle. (count,) int64."""
    if count < 2:
        raise ValueError("a Fourier partner needs a batch of at least 2 unlabelled images")
    order = torch.randperm(count, generator=generator, device=generator.device)
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    return partner


# --- what training does with them


def repeatable_fourier_view(image: torch.Tensor, partner: torch.Tensor, cfg: Config) -> torch.Tensor:
    """Return the Fourier view (B, 1, H, W) by a run's settings; where training draws the share (AM), the largest."""
    ratio = cfg.fourier_alpha if cfg.fourier_mode == "AM" else cfg.fourier_ratio
    return fourier_view(image, partner, mode=cfg.fourier_mode, window=cfg.fourier_window, ratio=ratio)


@dataclass(frozen=True)
class Augmentation:
    """The views that training takes of prepared canvases, as the settings say."""

    cfg: Config
    reference: torch.Tensor | None = None  # (P, Q) quantile curves, one drawn per image; None: no histogram matching
    num_classes: int | None = None  # of the masks, including the background; None: read off them

    def labeled(
        self, image: torch.Tensor, mask: torch.Tensor, quantiles: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment a labelled batch of canvases.

        image (B, 1, C, C) float, mask (B, 1, C, C) uint8, quantile curves (B, Q) of the images -> image
        (B, 1, size, size) float32, mask (B, size, size) int64.
        """
        theta = self._affine(len(image), generator)
        view = self._match(self._view(image, theta), quantiles, generator)
        view = self.changed(self._blur(view, generator)[0], generator)
        mask = self._view(mask, theta)
        return view, mask[:, 0].long()

    def unlabeled(
        self, image: torch.Tensor, quantiles: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Take the plain and, with `fourier_aug` (else None), the Fourier view of an unlabelled batch, moved alike.

        Canvases (B, 1, C, C) and their quantile curves (B, Q) -> views (B, 1, size, size) float32.
        """
        cfg, theta = self.cfg, self._affine(len(image), generator)
        plain = self._match(self._view(image, theta), quantiles, generator)
        if not cfg.fourier_aug:
            return self._blur(plain, generator)[0], None
        # The partner comes from the unmatched batch and undergoes the image's own geometry.
        partner = self._view(image[random_partner(len(image), generator)], theta)
        ratio: float | torch.Tensor = cfg.fourier_ratio
        if cfg.fourier_mode == "AM":
            ratio = torch.rand(len(image), 1, 1, 1, generator=generator, device=image.device) * cfg.fourier_alpha
        view = fourier_view(plain, partner, mode=cfg.fourier_mode, window=cfg.fourier_window, ratio=ratio)
        return self._blur(plain, generator, view)

    def changed(self, view: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Change the gray values of a share `intensity_aug` of the views, drawn one by one; at 0 draw nothing."""
        if not self.cfg.intensity_aug:
            return view
        chosen = torch.rand(len(view), 1, 1, 1, generator=generator, device=view.device) < self.cfg.intensity_aug
        return torch.where(chosen, random_intensity(view, generator), view)

    def _affine(self, count: int, generator: torch.Generator) -> torch.Tensor:
        settings = {name: getattr(self.cfg, name) for name in ("rotation", "max_shift", "flip")}
        return random_affine(count, generator=generator, **settings)

    def _view(self, canvas: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        size, field = self.cfg.image_size, self.cfg.field
        return canvas_to_view(canvas, size, theta, field=field, num_classes=self.num_classes)

    def _match(self, image: torch.Tensor, quantiles: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if self.reference is None:
            return image
        drawn = torch.randint(len(self.reference), (len(image),), generator=generator, device=image.device)
        return match_histogram(image, quantiles, self.reference[drawn])

    def _blur(self, image: torch.Tensor, generator: torch.Generator, *more: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Blur views of one batch alike: sigma U(0.25, 1.25) px at 288 px."""
        if not self.cfg.blur:
            return image, *more
        sigma = 0.25 + torch.rand(len(image), generator=generator, device=image.device)
        return tuple(gaussian_blur(view, sigma * self.cfg.image_size / self.cfg.field) for view in (image, *more))
