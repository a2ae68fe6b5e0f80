"""The tiled denoiser: the method's formulas, no seams, fixed shapes, and work that follows the tile, not the canvas."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from core.errors import Stopped
from tests import tiny
from worker.upscaler.plan import Size, Span, Tiling, tiling
from worker.upscaler.prompts import Conditioning
from worker.upscaler.schedules import timestep
from worker.upscaler.tiled import TiledDenoiser, hint_features, split_hint_encoder

SIGMA = 0.6

FACTORS = (0.0994, 0.1205, 0.1461, 0.1771, 0.2146, 0.2601, 0.3153, 0.3822, 0.4633, 0.5616, 0.6807, 0.825, 1)
"""What the original multiplies the residuals of Stable Diffusion 1.5 with, from the first to the deepest."""


@dataclass(frozen=True)
class Networks:
    unet: nn.Module
    controlnet: nn.Module
    """Without its encoder."""
    encoder: nn.Module
    whole_controlnet: nn.Module


@pytest.fixture(scope="module")
def networks() -> Networks:
    parts, others = tiny.components(), tiny.components()
    return Networks(parts.unet, parts.controlnet, split_hint_encoder(parts.controlnet), others.controlnet)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CONDITIONING = Conditioning(
    positive=_random(1, 77, tiny.CONTEXT_WIDTH, seed=1), negative=_random(1, 77, tiny.CONTEXT_WIDTH, seed=2)
)


class Oracle(nn.Module):
    """Stands in for a UNet: its answer is a function of its input, and it remembers what it was given."""

    def __init__(self, answer: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.only = nn.Parameter(torch.zeros((), dtype=dtype), requires_grad=False)
        self.answer = answer
        self.given: list[tuple[Tensor, Tensor, dict[str, Any]]] = []

    def forward(self, sample: Tensor, timestep: Tensor, _context: Tensor, **others: object) -> tuple[Tensor]:
        self.given.append((sample, timestep, others))
        return (self.answer(sample),)


class Ones(nn.Module):
    """Stands in for a ControlNet: so many residuals, all 1."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, *_args: Tensor, **_kwargs: object) -> tuple[list[Tensor], Tensor]:
        return [torch.ones(1)] * (self.blocks - 1), torch.ones(1)


def _denoiser(
    unet: nn.Module,
    tiles: Tiling,
    *,
    controlnet: nn.Module | None = None,
    features: Tensor | None = None,
    control_scale: float = 0.6,
    guidance_scale: float = 1.0,
    batch: int = 8,
    conditioning: Conditioning = CONDITIONING,
    check: Callable[[], None] = lambda: None,
) -> TiledDenoiser:
    return TiledDenoiser(
        unet,
        controlnet or nn.Identity(),
        tiles,
        conditioning,
        features,
        control_scale=control_scale,
        guidance_scale=guidance_scale,
        batch=batch,
        check=check,
    )


def _tiling(width: int, height: int, tile: int, *, overlap: int = 4, feathered: bool = True) -> Tiling:
    area = Size(width=width, height=height)
    return tiling(area, Size(width=tile, height=tile), overlap, feathered=feathered)


def _calls(module: nn.Module, during: Callable[[], object]) -> list[torch.Size]:
    """Return the shape of the first argument of each call."""
    shapes: list[torch.Size] = []

    def note(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        shapes.append(arguments[0].shape)

    with module.register_forward_pre_hook(note):
        during()
    return shapes


SETTINGS = [(6.0, 0.6), (1.0, 0.6), (0.0, 1.0), (6.0, 0.0), (3.0, -1.5)]


@pytest.mark.parametrize(("guidance_scale", "control_scale"), SETTINGS)
def test_one_tile_is_one_plain_call_of_the_networks(
    networks: Networks, guidance_scale: float, control_scale: float
) -> None:
    x, hint = _random(1, 4, 16, 24), torch.rand(1, 3, 128, 192, generator=torch.Generator().manual_seed(3))
    inputs, time = x / (SIGMA**2 + 1) ** 0.5, torch.tensor([timestep(SIGMA)])
    noise: list[Tensor] = []
    with torch.no_grad():
        for prompt in (CONDITIONING.positive, CONDITIONING.negative):
            down, middle = networks.whole_controlnet(inputs, time, prompt, hint, return_dict=False)
            residuals = [r * control_scale * 0.825 ** (12 - i) for i, r in enumerate([*down, middle])]
            prediction = networks.unet(
                inputs,
                time,
                prompt,
                down_block_additional_residuals=residuals[:-1],
                mid_block_additional_residual=residuals[-1],
            )
            noise.append(prediction.sample)
    positive, negative = noise
    expected = x - SIGMA * (negative + max(guidance_scale, 1) * (positive - negative))
    features = hint_features(networks.encoder, hint, lambda: None)
    denoise = _denoiser(
        networks.unet,
        _tiling(24, 16, 64),
        controlnet=networks.controlnet,
        features=features,
        guidance_scale=guidance_scale,
        control_scale=control_scale,
    )
    torch.testing.assert_close(denoise(x, SIGMA), expected, atol=5e-5, rtol=0)


class Case(NamedTuple):
    """A canvas of nine tiles."""

    x: Tensor
    features: Tensor
    tiles: Tiling


@pytest.fixture(scope="module")
def nine(networks: Networks) -> Case:
    hint = torch.rand(1, 3, 192, 256, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        features = cast("Tensor", networks.encoder(hint))
    tiles = tiling(Size(width=32, height=24), Size(width=16, height=12), 4, feathered=True)
    assert tiles.count == 9
    return Case(_random(1, 4, 24, 32), features, tiles)


def _estimate(networks: Networks, case: Case, *, batch: int = 8, guidance_scale: float = 6.0) -> Tensor:
    denoise = _denoiser(
        networks.unet,
        case.tiles,
        controlnet=networks.controlnet,
        features=case.features,
        guidance_scale=guidance_scale,
        batch=batch,
    )
    return denoise(case.x, SIGMA)


@pytest.fixture(scope="module")
def estimate_of_nine(networks: Networks, nine: Case) -> Tensor:
    return _estimate(networks, nine)


def test_many_tiles_are_the_weighted_mean_of_each_tiles_own_estimate(
    networks: Networks, nine: Case, estimate_of_nine: Tensor
) -> None:
    """The mean of the estimates x - sigma * noise is what the mean of the noise must come to."""
    sums = [torch.zeros_like(nine.x), torch.zeros_like(nine.x)]
    rows = zip(nine.tiles.rows, nine.tiles.row_weights, strict=True)
    columns = zip(nine.tiles.columns, nine.tiles.column_weights, strict=True)
    for (row, down), (column, across) in product(rows, list(columns)):
        area = ..., slice(*row), slice(*column)
        one = _tiling(column.stop - column.start, row.stop - row.start, 64)
        weights = torch.tensor([[high * wide for wide in across] for high in down])
        for total, prompt in zip(sums, (CONDITIONING.positive, CONDITIONING.negative), strict=True):
            denoise = _denoiser(
                networks.unet,
                one,
                controlnet=networks.controlnet,
                features=nine.features[area],
                conditioning=Conditioning(positive=prompt, negative=prompt),
            )
            total[area] += weights * denoise(nine.x[area], SIGMA)
    positive, negative = sums
    expected = negative + 6 * (positive - negative)
    torch.testing.assert_close(estimate_of_nine, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("batch", [1, 2, 4, 100])
def test_the_batch_size_does_not_matter(networks: Networks, nine: Case, estimate_of_nine: Tensor, batch: int) -> None:
    torch.testing.assert_close(_estimate(networks, nine, batch=batch), estimate_of_nine, atol=2e-5, rtol=0)


def test_the_order_of_the_tiles_does_not_matter(networks: Networks, nine: Case, estimate_of_nine: Tensor) -> None:
    rows, columns = (1, 2, 0), (2, 1, 0)
    shuffled = replace(
        nine.tiles,
        rows=tuple(nine.tiles.rows[i] for i in rows),
        row_weights=tuple(nine.tiles.row_weights[i] for i in rows),
        columns=tuple(nine.tiles.columns[i] for i in columns),
        column_weights=tuple(nine.tiles.column_weights[i] for i in columns),
    )
    other = _estimate(networks, nine._replace(tiles=shuffled))
    torch.testing.assert_close(other, estimate_of_nine, atol=2e-5, rtol=0)


def test_guidance_is_linear(networks: Networks, nine: Case) -> None:
    plain, double, far = (_estimate(networks, nine, guidance_scale=scale) for scale in (1.0, 2.0, 9.0))
    torch.testing.assert_close(far, plain + 8 * (double - plain), atol=1e-4, rtol=0)
    assert (double - plain).abs().max() > 0.01


def test_prompts_may_have_several_chunks(networks: Networks) -> None:
    positive, negative = CONDITIONING.positive.repeat(1, 2, 1), CONDITIONING.negative.repeat(1, 2, 1)
    long = Conditioning(positive=positive, negative=negative)
    tiles, x = _tiling(24, 16, 16), _random(1, 4, 16, 24)
    estimates = [
        _denoiser(networks.unet, tiles, guidance_scale=6, conditioning=each)(x, SIGMA) for each in (CONDITIONING, long)
    ]
    # Attention to the same tokens twice is attention to them once.
    torch.testing.assert_close(*estimates, atol=2e-5, rtol=0)


def test_each_call_of_a_network_has_one_shape_and_asks_about_both_prompts(networks: Networks, nine: Case) -> None:
    for network in (networks.unet, networks.controlnet):
        calls = _calls(network, lambda: _estimate(networks, nine, batch=2))
        assert calls == [torch.Size((4, 4, 12, 16))] * 5


@pytest.mark.parametrize("guidance_scale", [0.0, 0.5, 1.0])
def test_without_guidance_the_networks_see_half_as_much(networks: Networks, nine: Case, guidance_scale: float) -> None:
    for network in (networks.unet, networks.controlnet):
        guided = _calls(network, lambda: _estimate(networks, nine, guidance_scale=1.01))
        plain = _calls(network, lambda: _estimate(networks, nine, guidance_scale=guidance_scale))
        assert sum(shape[0] for shape in guided) == 2 * sum(shape[0] for shape in plain)


def test_the_hint_has_an_effect_that_grows_with_its_scale(networks: Networks, nine: Case) -> None:
    def estimate(scale: float, features: Tensor | None = nine.features) -> Tensor:
        denoise = _denoiser(
            networks.unet, nine.tiles, controlnet=networks.controlnet, features=features, control_scale=scale
        )
        return denoise(nine.x, SIGMA)

    without = estimate(0)
    weak, strong = (float((estimate(scale) - without).square().mean()) for scale in (0.1, 0.6))
    assert 0 < weak < strong
    assert (estimate(0.6, nine.features.flip(3)) - estimate(0.6)).abs().max() > 0.01
    assert not _calls(networks.controlnet, lambda: estimate(0))
    assert not _calls(networks.controlnet, lambda: estimate(0.6, None))
    assert torch.equal(estimate(0.6, None), without)


@pytest.mark.parametrize(("blocks", "factors"), [(13, FACTORS), (5, FACTORS[-5:])])
@pytest.mark.parametrize("scale", [0.6, 3.0, -2.0])
def test_residuals_count_less_the_further_they_are_from_the_deepest(
    blocks: int, factors: Sequence[float], scale: float
) -> None:
    unet = Oracle(torch.zeros_like)
    features = torch.zeros(1, 8, 16, 16)
    _denoiser(unet, _tiling(16, 16, 16), controlnet=Ones(blocks), features=features, control_scale=scale)(
        torch.zeros(1, 4, 16, 16), SIGMA
    )
    given = unet.given[0][2]
    residuals = torch.cat([*given["down_block_additional_residuals"], given["mid_block_additional_residual"]])
    torch.testing.assert_close(residuals, scale * torch.tensor(factors), atol=3e-4, rtol=0)


@pytest.mark.parametrize("sigma", [14.6, 1.0, 0.05])
def test_the_network_sees_unit_variance_and_the_training_step_of_the_noise(sigma: float) -> None:
    """Of a standard normal picture under noise, x / sqrt(sigma^2 + 1) has unit variance (Karras et al., 2022)."""
    unet, x = Oracle(lambda sample: sample), _random(1, 4, 64, 64) * (sigma**2 + 1) ** 0.5
    estimate = _denoiser(unet, _tiling(64, 64, 32))(x, sigma)
    torch.testing.assert_close(estimate, x * (1 - sigma / (sigma**2 + 1) ** 0.5), atol=1e-5, rtol=1e-5)
    for sample, time, _ in unet.given:
        assert 0.9 < float(sample.std()) < 1.1
        torch.testing.assert_close(time, torch.full((len(sample),), timestep(sigma)))


def test_networks_get_their_own_type_and_estimates_stay_precise() -> None:
    unet = Oracle(torch.ones_like, torch.bfloat16)
    estimate = _denoiser(unet, _tiling(75, 41, 16, overlap=7), guidance_scale=5)(torch.zeros(1, 4, 41, 75), 1.0)
    assert all(sample.dtype == torch.bfloat16 for sample, _, _ in unet.given)
    assert all(sample.is_contiguous(memory_format=torch.channels_last) for sample, _, _ in unet.given)
    assert estimate.dtype == torch.float32
    torch.testing.assert_close(estimate, torch.full_like(estimate, -1), atol=1e-6, rtol=0)


def test_the_argument_is_left_as_it_was(networks: Networks, nine: Case) -> None:
    before = nine.x.clone()
    _estimate(networks, nine)
    assert torch.equal(nine.x, before)


def _numbered(sample: Tensor) -> Tensor:
    """Answer 0 for the first tile of a batch, 1 for the second, …"""
    return torch.arange(len(sample), dtype=sample.dtype)[:, None, None, None].expand_as(sample)


@pytest.mark.parametrize("horizontal", [True, False])
@pytest.mark.parametrize("feathered", [True, False])
def test_a_tile_fades_into_the_next(*, horizontal: bool, feathered: bool) -> None:
    """Tiles 0 to 16 and 8 to 24: of a network that answers with the tile's number, the share of the second is left."""
    x = torch.zeros(1, 4, 16, 24) if horizontal else torch.zeros(1, 4, 24, 16)
    tiles = _tiling(x.shape[3], x.shape[2], 16, overlap=8, feathered=feathered)
    share = -_denoiser(Oracle(_numbered), tiles)(x, 1.0)
    ramp = [(i + 0.5) / 8 for i in range(8)] if feathered else [0.5] * 8
    expected = torch.tensor([0.0] * 8 + ramp + [1.0] * 8)
    torch.testing.assert_close(share, (expected if horizontal else expected[:, None]).expand_as(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("feathered", [True, False])
def test_a_convolution_gives_what_it_gives_untiled_except_at_the_edges_of_tiles(*, feathered: bool) -> None:
    kernel = _random(4, 4, 3, 3, seed=4)
    x, tiles = _random(1, 4, 40, 52), _tiling(52, 40, 16, overlap=6, feathered=feathered)
    unet = Oracle(lambda sample: functional.conv2d(sample, kernel, padding=1))
    tiled, untiled = _denoiser(unet, tiles)(x, SIGMA), _denoiser(unet, _tiling(52, 40, 64))(x, SIGMA)
    rows, columns = _edges(tiles.rows, 40), _edges(tiles.columns, 52)
    near = rows[:, None] | columns
    off = (tiled - untiled).abs().amax((0, 1))
    assert near.any() and not near.all()
    assert off[~near].max() < 1e-5
    assert off[near].min() > 1e-3


def _edges(spans: Sequence[Span], length: int) -> Tensor:
    """Mark the first and the last position of each span, those at the canvas's own edges excepted."""
    marked = {edge for span in spans for edge in (span.start, span.stop - 1)} - {0, length - 1}
    return torch.tensor([position in marked for position in range(length)])


def _seam(tiles: Tiling, x: Tensor, offset: float) -> float:
    """Measure the most abrupt step from one column to the next, relative to the most abrupt one of `x` itself.

    The network answers with its input, and adds to each tile another number of about the size `offset`.
    """
    offsets = offset * _random(tiles.count, 1, 1, 1, seed=6)
    unet = Oracle(lambda sample: sample + offsets)
    estimate = _denoiser(unet, tiles, batch=tiles.count)(x, 1.0)
    plain = _denoiser(Oracle(lambda sample: sample), _tiling(88, 60, 88))(x, 1.0)
    return float(estimate.diff(dim=3).abs().max() / plain.diff(dim=3).abs().max())


def test_feathered_tiles_leave_no_seams_where_uniform_ones_do() -> None:
    across, down = torch.linspace(0, 9, 88), torch.linspace(0, 5, 60)
    x = (torch.cos(down)[:, None] + torch.sin(across)).expand(1, 4, 60, 88)
    uniform, feathered = _tiling(88, 60, 32, feathered=False), _tiling(88, 60, 32, overlap=16)
    assert uniform.columns == (Span(0, 32), Span(28, 60), Span(56, 88))
    assert max(_seam(uniform, x, 0), _seam(feathered, x, 0)) < 1.0001
    assert _seam(uniform, x, 0.3) > 2.5 * _seam(feathered, x, 0.3)


def test_a_panorama_is_worked_on_in_small_tiles(networks: Networks) -> None:
    tiles = _tiling(512, 8, 64, overlap=16)
    denoise = _denoiser(networks.unet, tiles, batch=4)
    estimates: list[Tensor] = []
    shapes = _calls(networks.unet, lambda: estimates.append(denoise(_random(1, 4, 8, 512), SIGMA)))
    assert set(shapes) == {torch.Size((4, 4, 8, 64))}
    assert estimates[0].shape == (1, 4, 8, 512)
    assert estimates[0].isfinite().all()


def _stopping(after: int) -> Callable[[], None]:
    left = iter(range(after))

    def check() -> None:
        if next(left, None) is None:
            raise Stopped("The upscaling was told to stop.")

    return check


@pytest.mark.parametrize("after", [0, 3])
def test_the_work_stops_before_the_next_batch(after: int) -> None:
    unet = Oracle(torch.zeros_like)
    denoise = _denoiser(unet, _tiling(64, 64, 16), batch=2, check=_stopping(after))
    with pytest.raises(Stopped):
        denoise(torch.zeros(1, 4, 64, 64), SIGMA)
    assert len(unet.given) == after


class Allocations(TorchDispatchMode):
    """Records how many numbers the largest new or changed tensor has, between one call of `mark` and the next."""

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.largest = [0]

    def mark(self) -> None:
        self.largest.append(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.largest[-1] = max(self.largest[-1], *(each.numel() for each in _tensors(result)), 0)
        return result


def _tensors(result: object) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple | list):
        for each in cast("Sequence[object]", result):
            yield from _tensors(each)


@pytest.mark.parametrize("guidance_scale", [1.0, 6.0])
def test_what_is_held_for_a_batch_does_not_grow_with_the_canvas(guidance_scale: float) -> None:
    def largest(side: int) -> int:
        memory = Allocations()
        denoise = _denoiser(
            Oracle(lambda sample: sample),
            _tiling(side, side, 16),
            controlnet=Ones(13),
            features=torch.zeros(1, 8, side, side),
            guidance_scale=guidance_scale,
            batch=2,
            check=memory.mark,
        )
        x = torch.zeros(1, 4, side, side)
        with memory:
            denoise(x, SIGMA)
        # Before the first batch and after the last, work on the whole canvas is due.
        return max(memory.largest[1:-1])

    prompts = 2 if guidance_scale > 1 else 1
    assert largest(64) == largest(128) == 2 * prompts * 8 * 16 * 16


@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 3), (8, 8), (33, 10), (13, 29)])
@pytest.mark.parametrize("tile", [Size(width=1, height=1), Size(width=8, height=5), Size(width=64, height=64)])
def test_a_hint_encoded_in_tiles_is_the_hint_encoded_at_once(
    networks: Networks, width: int, height: int, tile: Size
) -> None:
    hint = torch.rand(1, 3, 8 * height, 8 * width, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = networks.encoder(hint)
    features = hint_features(networks.encoder, hint, lambda: None, tile=tile)
    torch.testing.assert_close(features, expected, atol=1e-6, rtol=0)


def test_the_hint_encoder_sees_little_more_than_a_tile(networks: Networks) -> None:
    hint, tile = torch.zeros(1, 3, 256, 512), Size(width=16, height=8)
    shapes = _calls(networks.encoder, lambda: hint_features(networks.encoder, hint, lambda: None, tile=tile))
    assert len(shapes) == 4 * 4
    assert max(shape[2] for shape in shapes) <= 8 * (8 + 6)
    assert max(shape[3] for shape in shapes) <= 8 * (16 + 6)


def test_features_have_the_encoders_type() -> None:
    encoder = split_hint_encoder(tiny.components().controlnet).bfloat16()
    features = hint_features(encoder, torch.zeros(1, 3, 64, 64), lambda: None)
    assert features.dtype == torch.bfloat16


def test_encoding_the_hint_stops_before_the_next_tile(networks: Networks) -> None:
    def encode() -> None:
        with pytest.raises(Stopped):
            hint_features(networks.encoder, torch.zeros(1, 3, 64, 256), _stopping(3), tile=Size(width=8, height=8))

    assert len(_calls(networks.encoder, encode)) == 3
