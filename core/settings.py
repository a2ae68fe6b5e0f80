"""Settings shared by every process: one frozen object, built where a process starts and passed on."""

import base64
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import AfterValidator, Field, HttpUrl, SecretStr, TypeAdapter
from pydantic.networks import IPvAnyNetwork
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from core.errors import DeploymentError

PREFIX = "UPSCALED_"


def _with_async_driver(url: str) -> str:
    """Name the one driver we use in an ordinary `postgres://` or `postgresql://` address."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in ("postgres", "postgresql", "postgresql+asyncpg"):
        raise ValueError("must begin with postgresql://")
    return f"postgresql+asyncpg://{rest}"


def _fernet_key(key: SecretStr) -> SecretStr:
    try:
        valid = len(base64.b64decode(key.get_secret_value(), altchars=b"-_", validate=True)) == 32
    except ValueError:
        valid = False
    if not valid:
        raise ValueError("each must be a Fernet key, as `upscaled secrets new-key` prints one")
    return key


_HTTP_URL = TypeAdapter[HttpUrl](HttpUrl)


def _checked_url(url: str) -> str:
    return str(_HTTP_URL.validate_python(url)).rstrip("/")


def _checked_url_or_none(url: str) -> str:
    return url and _checked_url(url)


class ModelSettings(BaseSettings):
    """What is told of models; part of `Settings`, and all that the commands about weights need."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    models_dir: Path = Path(".upscaled/models")
    """The folder of the weights."""

    clarity_checkpoint: str = ""
    """What replaces Stable Diffusion 1.5 itself: a safetensors file, or a folder of diffusers."""
    clarity_preset: Literal["quality", "compat"] = "quality"
    """compat cuts and blends tiles as the original did, seams included."""
    clarity_hint: Literal["input", "preupscaled"] = "input"
    """Which picture the ControlNet holds the result to: as it was sent, or as the pre-upscaler made it."""
    clarity_batch: Annotated[int, Field(ge=0)] = 0
    """Tiles that go through the networks at once; 0 leaves it to the free memory."""
    clarity_compile: bool = False
    """Compile the networks with the first job of each tile size."""

    superres_variant: Literal["fidelity", "restore"] = "restore"
    """Which of our own networks enlarges: the one that keeps to every pixel, or the one that also repairs."""
    superres_weights: str = ""
    """A file of another network to enlarge with, .safetensors or .pth; also Clarity's pre-upscaler."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"


class Settings(ModelSettings):
    """Read once from `UPSCALED_…` variables; each is documented in docs/settings.md."""

    database_url: Annotated[str, AfterValidator(_with_async_driver)]
    redis_url: Annotated[str, Field(pattern=r"^rediss?://")]
    secret_key: Annotated[SecretStr, Field(min_length=32)]
    """Signs the URLs of results; the same in every process."""

    public_url: Annotated[str, AfterValidator(_checked_url)] = "http://127.0.0.1:8000"
    """Where clients reach the API: the front of every URL we hand out."""

    encryption_keys: Annotated[tuple[Annotated[SecretStr, AfterValidator(_fernet_key)], ...], NoDecode] = ()
    """Fernet keys, comma-separated, that seal secrets at rest: the first seals, each opens. None: one made of the
    secret key, which opens in any case."""

    storage_dir: Path = Path(".upscaled/storage")
    """The folder of inputs and results, where no bucket is named."""
    s3_bucket: str = ""
    """Where it is set, inputs and results lie in this bucket."""
    s3_prefix: Annotated[str, Field(pattern=r"^([\w.-]+/)*$")] = ""
    """What every object's key begins with; ends in a slash."""
    s3_endpoint: Annotated[str, AfterValidator(_checked_url_or_none)] = ""
    """Where our processes reach the bucket; none: Amazon's."""
    s3_public_endpoint: Annotated[str, AfterValidator(_checked_url_or_none)] = ""
    """Where callers reach it; none: the same."""
    s3_region: str = "us-east-1"
    s3_access_key_id: str = ""
    s3_secret_access_key: SecretStr = SecretStr("")
    """Without the two boto3 looks for credentials where it always does: its own variables, files, the role."""
    s3_addressing: Literal["auto", "path", "virtual"] = "auto"
    """Whether the bucket stands in the path or in the host name."""
    s3_encryption: Literal["none", "AES256", "aws:kms"] = "none"
    """What the bucket is asked to encrypt objects with."""
    s3_kms_key_id: str = ""
    s3_checksums: Literal["when_required", "when_supported"] = "when_required"
    """Whether checksums that not every S3 knows are sent and asked for."""

    database_pool_size: Annotated[int, Field(ge=1)] = 10
    """Connections to Postgres that one process may hold."""

    engine: str = "auto"
    """auto, lanczos, superres, clarity or package.module:Class."""

    max_input_bytes: Annotated[int, Field(ge=1)] = 25 * 1024 * 1024
    """Largest image file accepted, however it arrives."""

    max_input_side: Annotated[int, Field(ge=1)] = 32_768
    """Longest side of a picture that is read; its pixels are bounded by those of the output."""
    max_output_pixels: Annotated[int, Field(ge=1)] = 100_000_000
    max_memory_bytes: Annotated[int, Field(ge=0)] = 0
    """A picture that would need more is refused; 0: as much as the machine, or the container, has."""
    decode_seconds: Annotated[float, Field(gt=0)] = 30.0
    """How much time of a processor decoding one picture may take."""

    result_ttl_seconds: Annotated[int, Field(ge=60)] = 24 * 3600
    upload_ttl_seconds: Annotated[int, Field(ge=60)] = 2 * 3600

    fetch_timeout_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Longest time that fetching an image by URL may take in all."""

    webhook_timeout_seconds: Annotated[float, Field(gt=0)] = 15.0
    webhook_retry_seconds: Annotated[tuple[float, ...], NoDecode] = (5, 300, 1800, 7200, 18_000, 36_000, 36_000)
    """Pauses between the attempts of one delivery, comma-separated; one attempt more than pauses."""

    put_timeout_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Longest time that one attempt to put a result to a caller's URL may take."""
    put_retry_seconds: Annotated[tuple[float, ...], NoDecode] = (1, 5, 15)
    """Pauses between the attempts to put a result, comma-separated; one attempt more than pauses."""

    outbound_allow: Annotated[tuple[IPvAnyNetwork, ...], NoDecode] = ()
    """Networks (CIDR, comma-separated) that user-given URLs may reach although they are not public."""
    outbound_proxy: Annotated[str, AfterValidator(_checked_url_or_none)] = ""
    """A forward proxy that all user-given URLs go through; it then decides which addresses are reached."""

    webhook_secret_overlap_seconds: Annotated[int, Field(ge=0)] = 24 * 3600
    """How long webhooks are signed with the old secret too after a rotation."""
    webhook_apiframe_signature: Literal["off", "digest", "hex"] = "off"
    """Send Apiframe's own signature too; its key is the SHA-256 of the API key, as bytes or as hexadecimal digits."""

    lease_seconds: Annotated[float, Field(ge=2)] = 30.0
    """How long a worker may be silent before its jobs are given to others."""
    max_strikes: Annotated[int, Field(ge=1)] = 3
    """How many attempts of one job may be lost to faults before it fails."""
    retry_seconds: Annotated[float, Field(ge=0)] = 10.0
    """How long a job waits after a first passing fault; five times longer after each further one."""
    drain_seconds: Annotated[float, Field(ge=0)] = 30.0
    """How long a worker that was told to end goes on with its job before it gives the job back."""
    stall_seconds: Annotated[float, Field(gt=0)] = 300.0
    """How long a running job may make no progress before its worker ends itself."""

    max_queued: Annotated[int, Field(ge=1)] = 10_000
    """How many jobs of one key may wait, where the key itself says nothing."""
    max_wait_seconds: Annotated[float, Field(gt=0)] = 4 * 3600.0
    """A job that would have to wait longer, by our estimate, is refused."""

    requests_per_minute: Annotated[int, Field(ge=0)] = 0
    """How many requests a key may make, where the key itself says nothing; 0: any number."""
    cors_origins: Annotated[tuple[Annotated[str, Field(pattern=r"^(\*|https?://[^/\s]+)$")], ...], NoDecode] = ()
    """Origins (comma-separated, `*` for any) whose pages may call the API from a browser."""

    sweep_seconds: Annotated[float, Field(gt=0)] = 2.0
    """How often the dispatcher sweeps, and how long a hint may be under way before it counts as missing."""

    log_level: Annotated[str, Field(pattern="^(DEBUG|INFO|WARNING|ERROR)$")] = "INFO"

    @property
    def beat_seconds(self) -> float:
        """How often a worker says that it lives: several beats may be lost before its lease runs out."""
        return self.lease_seconds / 6

    @pydantic.field_validator(
        *("encryption_keys", "webhook_retry_seconds", "put_retry_seconds", "outbound_allow", "cors_origins"),
        mode="before",
    )
    @classmethod
    def _split_at_commas(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def load_settings(**overrides: Any) -> Settings:
    """Read the environment; `overrides` win over it.

    Raises:
        DeploymentError: one line that names each variable that is missing or wrong, and never shows its value.
    """
    return _load(Settings, overrides)


def load_model_settings() -> ModelSettings:
    """Read from the environment what is told of models.

    Raises:
        DeploymentError: as `load_settings`.
    """
    return _load(ModelSettings, {})


Loaded = TypeVar("Loaded", bound=ModelSettings)


def _load(kind: type[Loaded], overrides: dict[str, Any]) -> Loaded:
    try:
        return kind(**overrides)
    except pydantic.ValidationError as error:
        faults = [f"{PREFIX}{str(fault['loc'][0]).upper()}: {fault['msg']}" for fault in error.errors()]
        raise DeploymentError("; ".join(faults)) from error
