"""The tiled VAE: what one piece would give, without seams, in bounded memory, and the VAE untouched."""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from core.errors import Stopped
from tests import tiny
from worker.upscaler import vae as module
from worker.upscaler.plan import Size, tiling
from worker.upscaler.vae import TiledVae

TILE = 256
"""Side of a tile in pixels: 32 cells, of which 16 are taken where it meets others on both sides."""


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return tiny.components().vae


@pytest.fixture(scope="module")
def local(vae: AutoencoderKL) -> AutoencoderKL:
    """The same without attention, which sees the whole canvas or the tile, so that these can be compared."""
    public: dict[str, Any] = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    plain = AutoencoderKL(**{**public, "mid_block_add_attention": cast("Any", False)})
    plain.load_state_dict(vae.state_dict(), strict=False)
    return plain.eval().requires_grad_(requires_grad=False)


def _on() -> None:
    """Go on."""


def _rgb(height: int, width: int, seed: int = 0) -> Tensor:
    """A picture with much at all scales, and brighter to the right."""
    random = torch.Generator().manual_seed(seed)
    octaves = [torch.rand((1, 3, height // 2**k + 2, width // 2**k + 2), generator=random) for k in range(0, 7, 2)]
    layers = [functional.interpolate(octave, (height, width), mode="bilinear") for octave in octaves]
    return (torch.stack(layers).mean(0) * 0.8 + torch.linspace(0, 0.2, width)).clamp(0, 1)


def _latents(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn((1, 4, height, width), generator=torch.Generator().manual_seed(seed)) * 0.18215


def _smooth(height: int, width: int) -> Tensor:
    """Latents that change slowly, and are something else on either side."""
    x, y = torch.linspace(0, 3, width), torch.linspace(0, 3, height)[:, None]
    return torch.stack([torch.sin(x + y), torch.cos(x - y), x - y / 2, torch.sin(2 * y) + x])[None] * 0.18215


def _whole(source: Tensor, *_: object) -> Tensor:
    """Measure all of the canvas in one piece."""
    return source


def _plainly_encoded(vae: AutoencoderKL, rgb: Tensor) -> Tensor:
    return cast("Any", vae).encode(rgb * 2 - 1).latent_dist.mode() * vae.config["scaling_factor"]


def _plainly_decoded(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    sample: Tensor = cast("Any", vae).decode(latents / vae.config["scaling_factor"]).sample
    return (sample / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize(("height", "width"), [(TILE, TILE), (64, 200), (8, 8)])
def test_a_canvas_of_one_tile_is_what_diffusers_makes_of_it(vae: AutoencoderKL, height: int, width: int) -> None:
    rgb, latents = _rgb(height, width), _latents(height // 8, width // 8)
    assert torch.equal(TiledVae(vae, TILE).encode(rgb, _on), _plainly_encoded(vae, rgb))
    assert torch.equal(TiledVae(vae, TILE).decode(latents, _on), _plainly_decoded(vae, latents))


@pytest.mark.parametrize(("halo", "most", "rms"), [(13, 2e-5, 2e-6), (module.HALO_CELLS, 3e-3, 1e-4)])
@pytest.mark.parametrize(("height", "width"), [(520, 376), (64, 1000)])
def test_with_exact_statistics_tiles_give_what_one_piece_gives(
    local: AutoencoderKL,
    height: int,
    width: int,
    halo: int,
    most: float,
    rms: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 13 cells are all that this network sees; what the usual halo leaves out matters little, even to noise.
    monkeypatch.setattr(module, "HALO_CELLS", halo)
    monkeypatch.setattr(module, "_miniature", _whole)
    rgb, latents, tiled = _rgb(height, width), _latents(height // 8, width // 8), TiledVae(local, 320)
    for off in (
        tiled.encode(rgb, _on) - _plainly_encoded(local, rgb),
        tiled.decode(latents, _on) - _plainly_decoded(local, latents),
    ):
        assert off.abs().max() < most
        assert off.square().mean().sqrt() < rms


def test_the_statistics_of_a_miniature_come_closer_than_each_tiles_own(
    local: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    rgb = _rgb(512, 768)
    latents = _plainly_encoded(local, rgb)
    decoded = _plainly_decoded(local, latents)

    def off() -> tuple[Tensor, Tensor]:
        tiled = TiledVae(local, TILE)
        return (tiled.encode(rgb, _on) - latents).square().mean(), (
            tiled.decode(latents, _on) - decoded
        ).square().mean()

    shared = off()
    monkeypatch.setattr(module, "_shared_statistics", nullcontext)
    assert all(error < 0.5 * own for error, own in zip(shared, off(), strict=True))


@pytest.mark.parametrize(("height", "width"), [(640, 640), (128, 4096), (8, 40_000), (1600, 200)])
def test_a_miniature_has_about_a_tiles_area_and_the_canvass_shape(vae: AutoencoderKL, height: int, width: int) -> None:
    with _shapes(vae.encoder) as shapes, pytest.raises(Stopped):
        TiledVae(vae, TILE).encode(_rgb(height, width), _stop_at(2))
    [(batch, channels, small_height, small_width)] = shapes
    assert (batch, channels) == (1, 3)
    assert 0.5 * TILE**2 <= small_height * small_width <= TILE**2
    if min(height, width) >= 128:
        assert small_width / small_height == pytest.approx(width / height, rel=0.15)


def _seam(vae: AutoencoderKL, latents: Tensor) -> float:
    """Compare the change from cell to cell where tiles meet with what it is elsewhere: 1 is as much as anywhere."""
    decoded = functional.avg_pool2d(TiledVae(vae, TILE).decode(latents, _on), 8)
    change = decoded.diff(dim=3).abs().amax((0, 1, 2))
    across = torch.zeros(change.shape, dtype=torch.bool)
    halo = module.HALO_CELLS
    inner = tiling(
        Size(width=latents.shape[3] - 2 * halo, height=1), Size(width=TILE // 8 - 2 * halo, height=1), 4, feathered=True
    )
    for before, after in pairwise(inner.columns):
        across[after.start + halo - 1 : before.stop + halo] = True
    # What the picture's own end does to it is no measure.
    elsewhere = change[8:-8][~across[8:-8]]
    return float(change[across].max() / elsewhere.quantile(0.99))


def test_where_tiles_meet_nothing_is_to_be_seen(vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = _smooth(32, 96)
    assert _seam(vae, latents) <= 1.05
    monkeypatch.setattr(module, "_shared_statistics", nullcontext)
    assert _seam(vae, latents) > 1.5


def _stop_at(call: int) -> Callable[[], None]:
    """Stop the work when it asks for the n-th time."""
    calls = iter(range(1, call))

    def check() -> None:
        if next(calls, None) is None:
            raise Stopped("Told to stop.")

    return check


def _parts(vae: nn.Module) -> list[tuple[str, int, list[str]]]:
    """Every part, by name and identity, and what it holds."""
    parts = cast("Iterable[tuple[str, nn.Module]]", vae.named_modules())
    return [(name, id(part), sorted(vars(part))) for name, part in parts]


@pytest.mark.parametrize("call", [1, 2, 4, None])
def test_the_vae_is_as_before_however_the_work_ends(vae: AutoencoderKL, call: int | None) -> None:
    before, weights = _parts(vae), {name: value.clone() for name, value in vae.state_dict().items()}
    with pytest.raises(Stopped) if call else nullcontext():
        TiledVae(vae, TILE).encode(_rgb(320, 320), _stop_at(call) if call else _on)
    with pytest.raises(Stopped) if call else nullcontext():
        TiledVae(vae, TILE).decode(_latents(40, 40), _stop_at(call) if call else _on)
    assert _parts(vae) == before
    assert all(torch.equal(value, weights[name]) for name, value in vae.state_dict().items())


def test_a_picture_leaves_no_trace_in_the_next(vae: AutoencoderKL) -> None:
    tiled, latents = TiledVae(vae, TILE), _latents(40, 40)
    alone = tiled.decode(latents, _on)
    tiled.decode(_latents(40, 40, seed=1) * 5 + 1, _on)
    with pytest.raises(Stopped):
        tiled.decode(_latents(40, 40, seed=1) * 5 + 1, _stop_at(3))
    assert torch.equal(tiled.decode(latents, _on), alone)


def test_check_is_asked_before_each_tile(vae: AutoencoderKL) -> None:
    asked: list[None] = []
    with _shapes(vae.decoder) as shapes:
        TiledVae(vae, TILE).decode(_latents(40, 40), lambda: asked.append(None))
    assert len(asked) == len(shapes)


@contextmanager
def _shapes(part: nn.Module) -> Generator[list[tuple[int, ...]]]:
    """Note what shapes go into a part."""
    seen: list[tuple[int, ...]] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(tuple(inputs[0].shape))

    handle = part.register_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize(("height", "width"), [(64, 4096), (4096, 64), (8, 264), (504, 296)])
def test_all_tiles_are_of_one_shape_and_all_of_the_canvas_is_filled(
    vae: AutoencoderKL, height: int, width: int
) -> None:
    tiled = TiledVae(vae, 512 if max(height, width) > 1000 else TILE)
    with _shapes(vae.encoder) as encoder, _shapes(vae.decoder) as decoder:
        latents = tiled.encode(_rgb(height, width), _on)
        decoded = tiled.decode(latents, _on)
    assert latents.shape == (1, 4, height // 8, width // 8)
    assert decoded.shape == (1, 3, height, width)
    assert latents.dtype == decoded.dtype == torch.float32
    # What no tile has written would be 0, and 0.5 in pixels.
    assert (latents != 0).any(1).all() and (decoded != 0.5).any(1).all()
    # The first is what the statistics are taken from.
    assert len(set(encoder[1:])) == len(set(decoder[1:])) == 1


class _Largest(TorchDispatchMode):
    """Note the largest tensor that anything gives, but for those of the canvas's own sides."""

    def __init__(self, *sides: tuple[int, ...]) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.numel, self._sides = 0, sides

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result: Any = func(*args, **(kwargs or {}))
        tensors: Iterable[Any] = cast("Any", result) if isinstance(result, tuple | list) else (result,)
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tuple(tensor.shape[-2:]) not in self._sides:
                self.numel = max(self.numel, tensor.numel())
        return cast("Any", result)


def test_what_is_held_does_not_grow_with_the_canvas(vae: AutoencoderKL) -> None:
    def largest(cells: int) -> int:
        rgb = _rgb(8 * cells, 8 * cells)
        with _Largest((cells, cells), (8 * cells, 8 * cells)) as mode:
            TiledVae(vae, 192).decode(TiledVae(vae, 192).encode(rgb, _on), _on)
        return mode.numel

    assert largest(32) == largest(64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_normalised_in_full_precision(vae: AutoencoderKL, dtype: torch.dtype) -> None:
    half = tiny.components().vae
    cast("nn.Module", half).to(dtype)
    latents = _latents(40, 40)
    expected = TiledVae(vae, TILE).decode(latents, _on)
    decoded = TiledVae(half, TILE).decode(latents, _on)
    assert decoded.dtype == torch.float32
    assert (decoded - expected).square().mean().sqrt() < 0.03 * expected.std()


def test_compiled_code_follows_the_exchange_of_norms() -> None:
    vae, latents = tiny.components().vae, _latents(40, 40)
    expected = TiledVae(vae, TILE).decode(latents, _on), _plainly_decoded(vae, latents)
    cast("Any", vae.decoder).compile(backend="eager")
    for _ in range(2):
        torch.testing.assert_close(_plainly_decoded(vae, latents), expected[1])
        torch.testing.assert_close(TiledVae(vae, TILE).decode(latents, _on), expected[0])


@pytest.mark.parametrize("tile_pixels", [0, 184, 260])
def test_tiles_of_which_nothing_would_be_left_are_refused(vae: AutoencoderKL, tile_pixels: int) -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        TiledVae(vae, tile_pixels)
