"""The weights that can be installed: which files of which repositories, how they are fetched and checked."""

import hashlib
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path

import pydantic

from core.errors import DeploymentError

RECORD = "pulled.json"
"""Beside an entry's files: what was pulled, for later checks of files whose hash the manifest does not know."""

_INCOMING = ".incoming"
"""The folder, beside an entry's files, for what is on its way."""

_WEIGHTS = "*.safetensors"

_SUFFIXES = (".safetensors", ".json", ".txt")
"""Nothing else is fetched: of other formats some, such as pickles, run code when they are read."""


class Role(StrEnum):
    BASE = "base"
    CONTROLNET = "controlnet"
    VAE = "vae"
    PREUPSCALER = "preupscaler"
    SAFETY = "safety"


class Commercial(StrEnum):
    """Whether the licence lets the weights be used for money."""

    YES = "yes"
    NO = "no"
    UNCLEAR = "unclear"


@dataclass(frozen=True, slots=True)
class File:
    """One file of a repository on the Hugging Face Hub.

    Raises:
        ValueError: it is neither safetensors nor plain text.
    """

    hub: str
    revision: str
    """A commit; "main", which can change, where none is known."""
    path: str
    """In the repository."""
    size: int | None = None
    """In bytes."""
    sha256: str | None = None
    installed: str = ""
    """Its path in the entry's folder, where that is another one."""

    def __post_init__(self) -> None:
        if not self.path.endswith(_SUFFIXES):
            raise ValueError(f"{self.path} of {self.hub} is none of {', '.join(_SUFFIXES)}")

    def within(self, folder: Path) -> Path:
        """Return where it is installed, given the entry's folder."""
        return folder / (self.installed or self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What is installed as one, in the folder of its name."""

    name: str
    role: Role
    files: tuple[File, ...]
    licence: str
    commercial: Commercial
    remark: str
    """What the licence asks for."""
    default: bool = True
    """Pulled unless others are named."""

    @property
    def size(self) -> int | None:
        """All files together, in bytes; None while one of them is unknown."""
        sizes = [file.size for file in self.files if file.size is not None]
        return sum(sizes) if len(sizes) == len(self.files) else None


_sd15 = partial(File, "stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14")
_tile = partial(File, "lllyasviel/control_v11f1e_sd15_tile", "3f877705c37010b7221c3d10743307d6b5b6efac")
_tile_fp16 = partial(
    File, "comfyanonymous/ControlNet-v1-1_fp16_safetensors", "e05625af65b7110c593fb4d426e53f9885da2b26"
)
_vae = partial(File, "stabilityai/sd-vae-ft-mse", "31f26fdeee1355a5c34592e401dd41e45d25a493")
_esrgan = partial(File, "Comfy-Org/Real-ESRGAN_repackaged", "ea19b4cd14f85a5b914eee8aa7ff77bc371039a0")
_juggernaut = partial(File, "dantea1118/juggernaut_reborn", "main")

_RAIL = (
    "The use restrictions of its Attachment A bind you and must be passed on to your users: nothing unlawful, harmful, "
    "deceptive or discriminating."
)

MANIFEST = (
    Entry(
        name="base",
        role=Role.BASE,
        files=(
            _sd15("model_index.json", 541, "e2f6f22e274374010aec30c79eb2d6e53fff4a36ac0225523a92cb2d41a83347"),
            _sd15(
                "scheduler/scheduler_config.json",
                308,
                "699cce92eb7c122e2eb7dfdea78e6187fda76a5ed4a8e42319b85610e620e091",
            ),
            _sd15("text_encoder/config.json", 617, "845df614cb9327ae7bbea027316246fae917827407da6df13572e41b5f93b4cc"),
            _sd15(
                "text_encoder/model.fp16.safetensors",
                246_144_864,
                "77795e2023adcf39bc29a884661950380bd093cf0750a966d473d1718dc9ef4e",
            ),
            _sd15("tokenizer/merges.txt", 524_619, "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"),
            _sd15(
                "tokenizer/special_tokens_map.json",
                472,
                "c4864a9376a8401918425bed71fc14fc0e81f9b59ec45c1cf96cccb2df508eac",
            ),
            _sd15(
                "tokenizer/tokenizer_config.json",
                806,
                "00439066fcba73de57644cf41e4e3b9f2dbb09d7f3fc2005898ba52399045882",
            ),
            _sd15(
                "tokenizer/vocab.json", 1_059_962, "e089ad92ba36837a0d31433e555c8f45fe601ab5c221d4f607ded32d9f7a4349"
            ),
            _sd15("unet/config.json", 743, "78f474de6bab3d893868f37be97b636ae65c0df3073ed3256ca458ff599b5f96"),
            _sd15(
                "unet/diffusion_pytorch_model.fp16.safetensors",
                1_719_125_304,
                "c83908253f9a64d08c25fc90874c9c8aef9a329ce1ca5fb909d73b0c83d1ea21",
            ),
        ),
        licence="CreativeML OpenRAIL-M",
        commercial=Commercial.YES,
        remark=f"Stable Diffusion 1.5. {_RAIL}",
    ),
    Entry(
        name="controlnet",
        role=Role.CONTROLNET,
        # The author's own repository has a pickle only; the other has the same weights, with their original names.
        files=(
            _tile("config.json", 955),
            _tile_fp16(
                "control_v11f1e_sd15_tile_fp16.safetensors",
                722_601_104,
                "2f31868eedb243a77932e3c63907a6ba0a2058b6d65b5c27b89ee1b7f618ea33",
            ),
        ),
        licence="OpenRAIL",
        commercial=Commercial.YES,
        remark=f"ControlNet 1.1 Tile. {_RAIL}",
    ),
    Entry(
        name="vae",
        role=Role.VAE,
        files=(
            _vae("config.json", 547, "92d3dfb746fca211a2c9e019e285f8597412211728dce3c5bcf4eda0f2d62e7e"),
            _vae(
                "diffusion_pytorch_model.safetensors",
                334_643_276,
                "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
            ),
        ),
        licence="MIT",
        commercial=Commercial.YES,
        remark="sd-vae-ft-mse. Keep the notice.",
    ),
    Entry(
        name="preupscaler",
        role=Role.PREUPSCALER,
        files=(
            _esrgan(
                "RealESRGAN_x4plus.safetensors",
                66_857_836,
                "37f9a931c215f040aa6d50f711f2cb115f713c46df1d0d6469a8bd7bfe9a60bb",
            ),
        ),
        licence="BSD-3-Clause",
        commercial=Commercial.YES,
        remark="Real-ESRGAN x4plus. Keep the notice.",
    ),
    Entry(
        name="safety",
        role=Role.SAFETY,
        files=(
            _sd15(
                "safety_checker/config.json",
                4_723,
                "5dd77a06cbd9b155060bd58deb81ffd1aafc1c6d7970acac674c1128bd4edfe2",
                "config.json",
            ),
            _sd15(
                "safety_checker/model.fp16.safetensors",
                608_018_440,
                "08902f19b1cfebd7c989f152fc0507bef6898c706a91d666509383122324b511",
                "model.safetensors",
            ),
        ),
        licence="CreativeML OpenRAIL-M",
        commercial=Commercial.YES,
        remark=f"The safety checker of Stable Diffusion 1.5. {_RAIL}",
    ),
    Entry(
        name="juggernaut",
        role=Role.BASE,
        files=(_juggernaut("juggernaut_reborn.safetensors"),),
        licence="derived from CreativeML OpenRAIL-M",
        commercial=Commercial.UNCLEAR,
        remark="Juggernaut Reborn, 2.1 GB, a third party's copy. Read its authors' terms before you use it for money.",
        default=False,
    ),
)
"""Sizes and hashes are those that others published after a download; None where none was found."""


def missing(models_dir: Path, checkpoint: str = "") -> list[Path]:
    """Return the folders in which Clarity looks for weights and finds none, whoever was to put them there.

    The base is not needed by a `checkpoint` that is a folder of diffusers.
    """
    base = () if checkpoint and Path(checkpoint).is_dir() else ("base/unet", "base/text_encoder")
    folders = [models_dir / name for name in (*base, "controlnet", "vae")]
    return [folder for folder in folders if not any(folder.glob(_WEIGHTS))]


def require(models_dir: Path, checkpoint: str = "") -> None:
    """Refuse to go on without the weights that Clarity needs.

    Raises:
        DeploymentError: some are missing; the sentence names the command that fetches them.
    """
    if folders := missing(models_dir, checkpoint):
        raise DeploymentError(
            f"UPSCALED_ENGINE is clarity, but these weights are missing: {', '.join(map(str, folders))}; "
            "`upscaled models pull` fetches them."
        )


def preupscaler(models_dir: Path) -> Path | None:
    """Return the file of the pre-upscaler that is installed, whichever it is."""
    return min((models_dir / "preupscaler").glob(_WEIGHTS), default=None)


def safety_checker(models_dir: Path) -> Path | None:
    """Return the folder of the safety checker if it is installed."""
    folder = models_dir / "safety"
    return folder if any(folder.glob(_WEIGHTS)) else None


def is_installed(models_dir: Path, entry: Entry) -> bool:
    """Tell whether all files of an entry are there and have the right size; `verify` looks into them."""
    paths = [(file.within(models_dir / entry.name), file.size) for file in entry.files]
    return all(path.is_file() and size in (None, path.stat().st_size) for path, size in paths)


def verify(models_dir: Path, entry: Entry) -> list[str]:
    """Return what is wrong with an entry's files, a sentence each; it reads all of them.

    They are held against the manifest, and where it knows nothing, against what was recorded when they were pulled.

    Raises:
        DeploymentError: the record cannot be read.
    """
    folder = models_dir / entry.name
    pulled = _read_record(folder)
    problems = (_problem(file.within(folder), file, pulled.get(file.path)) for file in entry.files)
    return [problem for problem in problems if problem is not None]


def pull(models_dir: Path, entry: Entry, on_file: Callable[[File], object] = lambda _: None) -> None:
    """Fetch the files of an entry that are not there yet, or not as they should be; `on_file` is told of each before.

    A file takes its place once it is whole and checked; it stays when a later one fails. HF_ENDPOINT and HF_TOKEN of
    the environment count.

    Raises:
        DeploymentError: a file cannot be fetched, or is not the one that the manifest or the hub promised.
    """
    folder = models_dir / entry.name
    pulled = _read_record(folder)
    for file in entry.files:
        record = pulled.get(file.path)
        if (file.sha256 or record) and _problem(file.within(folder), file, record) is None:
            continue
        on_file(file)
        pulled[file.path] = _fetch(file, folder)
        _write_record(folder, pulled)
    shutil.rmtree(folder / _INCOMING, ignore_errors=True)


class _Pulled(pydantic.BaseModel):
    """What arrived."""

    hub: str
    revision: str
    """The commit."""
    size: int
    sha256: str


_RECORD = pydantic.TypeAdapter[dict[str, _Pulled]](dict[str, _Pulled])


def _read_record(folder: Path) -> dict[str, _Pulled]:
    try:
        return _RECORD.validate_json((folder / RECORD).read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, pydantic.ValidationError) as error:
        raise DeploymentError(f"{folder / RECORD} cannot be read; delete it and pull again.") from error


def _write_record(folder: Path, pulled: dict[str, _Pulled]) -> None:
    part = folder / f"{RECORD}.part"
    part.write_bytes(_RECORD.dump_json(pulled, indent=2))
    part.replace(folder / RECORD)


def _problem(path: Path, file: File, pulled: _Pulled | None) -> str | None:
    if not path.is_file():
        return f"{path} is missing."
    size = file.size if file.size is not None or pulled is None else pulled.size
    if size not in (None, path.stat().st_size):
        return f"{path} has {path.stat().st_size} bytes, not {size}."
    sha256 = file.sha256 if file.sha256 is not None or pulled is None else pulled.sha256
    if sha256 is not None and (found := _sha256(path)) != sha256:
        return f"{path} has the SHA-256 {found}, not {sha256}."
    return None


def _fetch(file: File, folder: Path) -> _Pulled:
    """Download a file, check it and put it into its place."""
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url  # pyright: ignore[reportUnknownVariableType]
    except ModuleNotFoundError as error:
        raise DeploymentError(f"Weights are pulled by what upscaled[worker] installs: {error}.") from error
    url = hf_hub_url(file.hub, file.path, revision=file.revision)
    try:
        promised = get_hf_file_metadata(url)
        commit = promised.commit_hash or file.revision
        arrived = Path(hf_hub_download(file.hub, file.path, revision=commit, local_dir=folder / _INCOMING))
    except Exception as error:  # network, hub or disk: the library has no one name for them
        raise DeploymentError(f"{url} cannot be pulled: {_reason(error)}.") from error
    found = _Pulled(hub=file.hub, revision=commit, size=arrived.stat().st_size, sha256=_sha256(arrived))
    # For large files the hub's ETag is their hash.
    large = promised.etag is not None and re.fullmatch("[0-9a-f]{64}", promised.etag)
    expected = replace(file, sha256=file.sha256 or (promised.etag if large else None))
    if (problem := _problem(arrived, expected, found)) is not None:
        arrived.unlink()
        raise DeploymentError(f"{url} is not what was expected: {problem}")
    file.within(folder).parent.mkdir(parents=True, exist_ok=True)
    arrived.replace(file.within(folder))
    return found


def _reason(error: Exception) -> str:
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the hub answered {status}; there is no such file, or HF_TOKEN does not open it"
    if status is not None:
        return f"the hub answered {status}"
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


def _sha256(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
