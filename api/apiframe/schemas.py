"""Apiframe's words: what its requests may hold and what its answers look like.

Where its model page and its OpenAPI document differ, requests accept both and answers take the document's form.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal, Self
from uuid import UUID

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    PlainSerializer,
    StringConstraints,
    WrapValidator,
    model_validator,
)

from api.intake import draw_seed
from core.addresses import MAX_URL_CHARACTERS
from core.apiframe import timestamp
from core.dialects import AnyScaleFactor, Dialect, Format, Prompt, ScaleFactor, parameter, storable, translate
from core.errors import ValidationError
from core.options import UpscaleOptions
from db.models import JobStatus, Scope, WebhookEvent

Timestamp = Annotated[datetime, PlainSerializer(timestamp, return_type=str)]

Text = Annotated[str, StringConstraints(min_length=1), AfterValidator(storable)]
Url = Annotated[str, StringConstraints(min_length=1, max_length=2048), AfterValidator(storable)]
UploadUrl = Annotated[str, StringConstraints(min_length=1, max_length=MAX_URL_CHARACTERS), AfterValidator(storable)]


def _parameter(
    name: str, description: str | None = None, *, step: float | None = None, of: Dialect = Dialect.APIFRAME
) -> Any:
    """Make the field of a parameter, with the default and the range that the table of dialects gives it."""
    row = parameter(of, name)
    # The page's steps are those of its sliders; its OpenAPI document takes any value in range, and so do we.
    extra: dict[str, JsonValue] = {} if step is None else {"x-step": step}
    return Field(row.default, ge=row.low, le=row.high, description=description, json_schema_extra=extra)


class Request(BaseModel):
    # Strict: "0.35" is no number and 1 is no string. A field nobody knows is refused by its name.
    model_config = ConfigDict(extra="forbid", strict=True)


_OUTPUT_QUALITY = "Quality of jpg and webp. An addition of ours."


class Params(Request):
    """What the parameters of every model hold."""

    image: Text = Field(
        description="An http(s) URL, upload://<id> or the id of an upload, a data URI with base64, or base64."
    )


class ClarityUpscaleParams(Params):
    """The parameters of clarity-upscale; defaults and ranges are the model page's."""

    prompt: Prompt = _parameter("prompt", "Describes the kind of detail to add.")
    negative_prompt: Prompt = _parameter("negative_prompt", "Describes what to keep out.")
    scale_factor: ScaleFactor = _parameter("scale_factor", "Output side over input side.")
    creativity: float = _parameter("creativity", "How much is invented.", step=0.05)
    resemblance: float = _parameter("resemblance", "How tightly to stick to the input.", step=0.05)
    dynamic: float = _parameter("dynamic", "HDR: the pull of the prompt.", step=1)
    num_inference_steps: int = _parameter("num_inference_steps", "Denoising steps.", step=1)
    sharpen: float = _parameter("sharpen", "Sharpening of the finished picture.")
    output_format: Format = _parameter("output_format")
    output_quality: int = _parameter("output_quality", _OUTPUT_QUALITY)
    seed: int | None = _parameter("seed", "Repeats a result; drawn when absent.", step=1)


class SuperresParams(Params):
    """The parameters of superres, a model of ours."""

    scale_factor: AnyScaleFactor = _parameter(
        "scale_factor", "Output side over input side.", of=Dialect.APIFRAME_SUPERRES
    )
    output_format: Format = _parameter("output_format", of=Dialect.APIFRAME_SUPERRES)
    output_quality: int = _parameter("output_quality", _OUTPUT_QUALITY, of=Dialect.APIFRAME_SUPERRES)


EventName = Literal["progress", "completed", "failed", "cancelled"]
EventNames = Annotated[list[EventName], Field(min_length=1)]


class UpscaleRequest(Request):
    """What a request to upscale one image holds, whatever the model."""

    params_field: ClassVar[str]
    """Where the model's parameters are."""

    priority: int = Field(
        0,
        ge=-10,
        le=10,
        description="Among your waiting jobs of equal cost higher goes first. An addition of ours.",
    )
    uploadUrl: UploadUrl | None = Field(
        None, description="Where to PUT the result, for example a signed URL of a bucket. An addition of ours."
    )
    webhookUrl: Url | None = Field(None, description="Where to POST events of this job.")
    webhook_url: Url | None = Field(None, description="The model page's spelling of webhookUrl.")
    webhookEvents: EventNames | None = Field(None, description="Which events; all but progress when absent.")
    webhook_events: EventNames | None = Field(None, description="Another spelling of webhookEvents.")

    @model_validator(mode="after")
    def _one_spelling(self) -> Self:
        if self.webhookUrl and self.webhook_url:
            raise ValueError("webhookUrl and webhook_url are the same field: give one of them")
        if self.webhookEvents and self.webhook_events:
            raise ValueError("webhookEvents and webhook_events are the same field: give one of them")
        return self

    @property
    @abstractmethod
    def params(self) -> Params: ...

    @abstractmethod
    def to_options(self) -> UpscaleOptions:
        """Translate the parameters into our words."""

    @property
    def webhook_field(self) -> str:
        return "webhook_url" if self.webhook_url else "webhookUrl"

    def wanted_webhook(self) -> str | None:
        return self.webhookUrl or self.webhook_url

    def wanted_events(self) -> Sequence[WebhookEvent]:
        named = self.webhookEvents or self.webhook_events or ("completed", "failed", "cancelled")
        return [WebhookEvent(name) for name in named]


class ClarityUpscaleRequest(UpscaleRequest):
    """A request to upscale one image by clarity-upscale."""

    params_field = "clarityUpscaleParams"

    model: Literal["clarity-upscale"]
    clarityUpscaleParams: ClarityUpscaleParams
    prompt: Prompt = Field("", description="The same as in the parameters, where the model page also puts it.")

    @property
    def params(self) -> ClarityUpscaleParams:
        return self.clarityUpscaleParams

    def to_options(self) -> UpscaleOptions:
        prompt = self.params.prompt or self.prompt
        return translate(Dialect.APIFRAME, self.params.model_dump(exclude={"image"}) | {"prompt": prompt}, draw_seed())


class SuperresRequest(UpscaleRequest):
    """A request to upscale one image by superres."""

    params_field = "superresParams"

    model: Literal["superres"]
    superresParams: SuperresParams

    @property
    def params(self) -> SuperresParams:
        return self.superresParams

    def to_options(self) -> UpscaleOptions:
        return translate(Dialect.APIFRAME_SUPERRES, self.params.model_dump(exclude={"image"}), draw_seed())


class _Named(BaseModel):
    model: Literal["clarity-upscale", "superres"]


_Either = ClarityUpscaleRequest | SuperresRequest
_REQUESTS: Mapping[str, type[_Either]] = {"clarity-upscale": ClarityUpscaleRequest, "superres": SuperresRequest}


def _read(body: Any, _union: Any) -> _Either:
    """Read a body as a request to the model that it names.

    The union would do the same, but put the model's name into the path of every field that it complains of.
    """
    model = _Named.model_validate(body, from_attributes=True).model
    for other, request in _REQUESTS.items():
        if other != model and request.params_field in body:
            own = _REQUESTS[model].params_field
            raise ValidationError({request.params_field: [f"belongs to model {other}; {model} takes {own}"]})
    return _REQUESTS[model].model_validate(body, from_attributes=True)


AnyUpscaleRequest = Annotated[_Either, Discriminator("model"), WrapValidator(_read)]
"""A request to upscale one image."""


class JobAccepted(BaseModel):
    jobId: UUID
    status: JobStatus


class ListedJob(BaseModel):
    """A job as GET /v2/jobs lists it."""

    id: UUID
    status: JobStatus
    model: str
    progress: int = Field(description="0 to 100.")
    result: dict[str, Any] | None = Field(description="`images` holds one URL, readable until expiresAt.")
    error: str | None
    errorCode: str | None = Field(description="A stable word for why the job failed; docs/errors.md lists them.")
    creditCost: int | None = Field(description="Always null: nothing is charged here.")
    webhookStatus: Literal["pending", "delivered", "failed"] | None
    createdAt: Timestamp
    startedAt: Timestamp | None
    completedAt: Timestamp | None
    expiresAt: Timestamp | None
    expired: bool


class JobObject(ListedJob):
    """A job as GET /v2/jobs/{id} shows it."""

    input: dict[str, Any]
    queuePosition: int | None = Field(description="While QUEUED: 1 is next. Null beyond 10000.")
    estimatedStartAt: Timestamp | None = Field(description="While QUEUED and enough is known to estimate it.")
    cancelRequestedAt: Timestamp | None = Field(description="When a running job was asked to stop.")
    deadlineAt: Timestamp | None = Field(description="When the job is cancelled by itself: see Cancel-After.")


class JobList(BaseModel):
    jobs: list[ListedJob]
    nextCursor: str | None
    hasMore: bool
    models: list[str] | None = None


class UploadObject(BaseModel):
    id: UUID
    url: str = Field(description="Readable until expiresAt, and good as an `image`.")
    kind: Literal["image"] = "image"
    contentType: str
    byteSize: int
    expiresAt: Timestamp


class PresignRequest(Request):
    """An image that is to be put into the storage directly."""

    contentType: Literal["image/png", "image/jpeg", "image/webp"]
    byteSize: int = Field(ge=1, description="The exact size of the file.")


class PresignedUpload(BaseModel):
    id: UUID
    image: str = Field(description="What names it as an `image`, once it was put: upload://<id>.")
    method: Literal["PUT"] = "PUT"
    url: str = Field(description="Takes the file once, without an API key, until expiresAt.")
    headers: dict[str, str] = Field(description="Headers that the PUT must have; HTTP clients add Content-Length.")
    expiresAt: Timestamp
    imageExpiresAt: Timestamp = Field(description="Until when the image can be used.")


class User(BaseModel):
    id: UUID
    email: str | None
    role: Literal["ADMIN", "MEMBER", "OWNER"]


class Team(BaseModel):
    id: str
    name: str
    plan: str
    credits: int | None = Field(description="Always null: nothing is charged here.")
    customerId: str | None


class KeyObject(BaseModel):
    id: UUID
    name: str
    prefix: str = Field(description="The first characters of the key.")
    scopes: list[Scope] = Field(description="What the key may be used for; admin includes the others.")
    expiresAt: Timestamp | None
    requestsPerMinute: int | None = Field(description="Null: any number.")
    dailyPixels: int | None = Field(description="How many may be made for the key in a day, by UTC. Null: any number.")


class Account(BaseModel):
    user: User
    team: Team
    apiKey: KeyObject


class ModelObject(BaseModel):
    id: str
    label: str
    modality: Literal["image"] = "image"
    description: str
    pricingMode: Literal["flat"] = "flat"
    costMin: int = 0
    costMax: int = 0
    paramsKey: str
    params: dict[str, Any] = Field(description="JSON Schema of the parameters: defaults, ranges and steps.")


class ModelList(BaseModel):
    models: list[ModelObject]
