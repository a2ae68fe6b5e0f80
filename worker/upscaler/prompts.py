"""Prompts: their little language, and how they become what the UNet attends to.

The language is that of the AUTOMATIC1111 web interface: `(stronger)`, `[weaker]`, `(just so:1.3)`, `BREAK`,
`<lora:name:0.8>`. Its `[scheduled:words:0.5]` and `[alternating|words]` are plain text here.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from torch.func import functional_call
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from core.errors import DeploymentError

CHUNK_TOKENS = 75
"""Tokens of a prompt that the text encoder reads at once; with the marks of beginning and end 77."""

MAX_WEIGHT = 100.0
"""Weights count as at most so much, in both directions: beyond, half precision overflows."""

_FACTORS = {"(": 1.1, "[": 1 / 1.1}
"""What brackets multiply by that name no weight."""

_OPENERS = {")": "(", "]": "["}

_COMMA_REACH = 20
"""So many tokens at most are moved to the next chunk to begin it after a comma."""

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"

_PIECE = re.compile(
    rf"\\(?P<escaped>[\\()\[\]])|:\s*(?P<weight>{_NUMBER})\s*\)|(?P<bracket>[()\[\]])|(?P<break>\s*\bBREAK\b\s*)|.",
    re.DOTALL,
)

_LORA = re.compile(rf"<lora:(?P<name>[^<>:]+)(?::(?P<first>{_NUMBER}))?(?::(?P<second>{_NUMBER}))?>")


class Fragment(NamedTuple):
    """Text of one weight."""

    text: str
    weight: float = 1.0
    ends_chunk: bool = False
    """Whether a BREAK follows."""


def parse(prompt: str) -> list[Fragment]:
    r"""Split a prompt into fragments; neighbours differ in weight, or a BREAK lies between them.

    `(x)` multiplies by 1.1, `[x]` divides by it, `(x:1.3)` multiplies by 1.3, what is nested multiplies; `\(`, `\)`,
    `\[`, `\]` and `\\` are characters. A bracket that is never closed holds to the end, one that was never opened is
    text. Nothing else is removed but the space around BREAK.
    """
    pieces: list[Fragment] = []
    opened: dict[str, list[int]] = {opener: [] for opener in _FACTORS}

    def multiply(start: int, factor: float) -> None:
        for index in range(start, len(pieces)):
            weight = _limited(pieces[index].weight * _limited(factor))
            pieces[index] = pieces[index]._replace(weight=weight)

    for match in _PIECE.finditer(prompt):
        bracket, weight = match["bracket"], match["weight"]
        opener = "(" if weight else _OPENERS.get(bracket)
        if bracket in opened:
            opened[bracket].append(len(pieces))
        elif opener and opened[opener]:
            multiply(opened[opener].pop(), float(weight or _FACTORS[opener]))
        elif match["break"]:
            pieces.append(Fragment("", ends_chunk=True))
        else:
            pieces.append(Fragment(match["escaped"] or match[0]))
    for opener, starts in opened.items():
        for start in starts:
            multiply(start, _FACTORS[opener])
    return _merged(pieces)


def _limited(weight: float) -> float:
    return max(-MAX_WEIGHT, min(weight, MAX_WEIGHT))


def _merged(pieces: list[Fragment]) -> list[Fragment]:
    """Join neighbours of equal weight; a break joins what it follows."""
    fragments: list[Fragment] = []
    for piece in pieces:
        last = fragments[-1] if fragments and not fragments[-1].ends_chunk else None
        if last and (piece.ends_chunk or piece.weight == last.weight):
            fragments[-1] = Fragment(last.text + piece.text, last.weight, piece.ends_chunk)
        else:
            fragments.append(piece)
    return fragments


class Lora(NamedTuple):
    """A LoRA that a prompt asks for, and how strongly."""

    name: str
    unet_weight: float = 1.0
    text_weight: float = 1.0


def extract_loras(prompt: str) -> tuple[str, list[Lora]]:
    """Take the `<lora:…>` tags out of a prompt, in their order; what does not read as one stays text.

    `<lora:name>` has weight 1. Of two weights the first is the text encoder's, the second the UNet's, as in the web
    interface; one weight counts for both.
    """
    loras: list[Lora] = []
    for match in _LORA.finditer(prompt):
        text_weight = _limited(float(match["first"] or 1))
        unet_weight = _limited(float(match["second"])) if match["second"] else text_weight
        loras.append(Lora(match["name"].strip(), unet_weight, text_weight))
    return _LORA.sub("", prompt), loras


def load_embeddings(folder: Path, width: int) -> dict[str, Tensor]:
    """Read the textual inversions of a folder, each as (vectors, `width`), by their files' names.

    Raises:
        DeploymentError: a file is damaged, or is for another text encoder.
    """
    return {file.stem: _load_embedding(file, width) for file in sorted(folder.glob("*.safetensors"))}


def _load_embedding(file: Path, width: int) -> Tensor:
    try:
        tensors = load(file.read_bytes())
    except (OSError, SafetensorError) as error:
        raise DeploymentError(f"The embedding {file} cannot be read: {error}") from error
    # In this order: of the web interface, of SDXL beside the vectors for its other encoder, of diffusers.
    named = [tensors[key] for key in ("emb_params", "clip_l") if key in tensors]
    candidates = named or list(tensors.values())
    vectors = candidates[0] if len(candidates) == 1 else torch.empty(0)
    if vectors.ndim == 1:
        vectors = vectors[None]
    if vectors.ndim != 2 or vectors.shape[1] != width or not 0 < len(vectors) <= CHUNK_TOKENS:
        shapes = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in tensors.items())
        raise DeploymentError(
            f"The embedding {file} does not fit: it holds {shapes or 'nothing'}, and this text encoder takes 1 to "
            f"{CHUNK_TOKENS} vectors of width {width}."
        )
    return vectors


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """What the UNet attends to: (1, 77·k, width) each, of equal length."""

    positive: Tensor
    negative: Tensor


class _Token(NamedTuple):
    id: int
    """Ids from the end of the vocabulary on are vectors of embeddings."""
    weight: float


class PromptEncoder:
    """Encode prompts of any length with the text encoder of Stable Diffusion 1.5.

    `embeddings` are textual inversions, (vectors, width) each. Where a prompt contains a name as a word, in whatever
    case, its vectors stand in its place; of two names that fit the longer one counts.
    """

    def __init__(self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, embeddings: Mapping[str, Tensor]) -> None:
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder
        self._bos = cast("int", tokenizer.bos_token_id)
        self._eos = cast("int", tokenizer.eos_token_id)
        self._comma = tokenizer.get_vocab()[",</w>"]
        # Longest first: an alternative that matches ends the search.
        names = sorted(embeddings, key=len, reverse=True)
        alternatives = "|".join(f"({re.escape(name)})" for name in names) or "(?!)"
        self._names = re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)", re.IGNORECASE)
        self._vectors = [embeddings[name] for name in names]
        stops = list(accumulate(map(len, self._vectors), initial=self._token_table.shape[0]))
        self._embedding_ids = [range(*pair) for pair in pairwise(stops)]

    @property
    def _token_table(self) -> Tensor:
        return self._text_encoder.embeddings.token_embedding.weight

    @torch.no_grad()
    def encode(self, prompt: str, negative_prompt: str, clip_skip: int = 0) -> Conditioning:
        """Encode both prompts in the text encoder's precision; empty chunks make the shorter one as long as the other.

        `clip_skip` is how many of the last layers are left out. With all weights 1 the result is the text encoder's
        own.
        """
        positive, negative = self._chunks(prompt), self._chunks(negative_prompt)
        count = max(len(positive), len(negative))
        padded = [chunk for part in (positive, negative) for chunk in (*part, *[[]] * (count - len(part)))]
        states = self._encode(padded, clip_skip)
        halves = states.reshape(2, 1, -1, states.shape[-1])
        return Conditioning(positive=halves[0], negative=halves[1])

    def _chunks(self, prompt: str) -> list[list[_Token]]:
        """Cut a prompt into chunks, at least one; after a comma where one is near, never within an embedding.

        A BREAK ends the chunk that it finds begun: it never makes an empty one.
        """
        chunks: list[list[_Token]] = []
        chunk: list[_Token] = []
        for fragment in parse(prompt):
            for ids in self._runs(fragment.text):
                if len(chunk) + len(ids) > CHUNK_TOKENS:
                    cut = self._cut(chunk) if len(ids) == 1 else len(chunk)
                    chunks.append(chunk[:cut])
                    chunk = chunk[cut:]
                chunk.extend(_Token(id, fragment.weight) for id in ids)
            if fragment.ends_chunk and chunk:
                chunks.append(chunk)
                chunk = []
        return [*chunks, chunk] if chunk or not chunks else chunks

    def _runs(self, text: str) -> Iterator[Sequence[int]]:
        """Tokenise a text into runs that stay together: single tokens, and embeddings."""
        done = 0
        for match in self._names.finditer(text):
            yield from self._tokens(text[done : match.start()])
            yield self._embedding_ids[cast("int", match.lastindex) - 1]
            done = match.end()
        yield from self._tokens(text[done:])

    def _tokens(self, text: str) -> Iterator[list[int]]:
        encoded = self._tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)
        return ([id] for id in cast("list[int]", encoded["input_ids"]))

    def _cut(self, chunk: list[_Token]) -> int:
        """Tell how many tokens of a full chunk belong to it."""
        for index in range(len(chunk) - 1, len(chunk) - 1 - _COMMA_REACH, -1):
            if chunk[index].id == self._comma:
                return index + 1
        return len(chunk)

    def _encode(self, chunks: list[list[_Token]], clip_skip: int) -> Tensor:
        """Encode chunks as (chunks, 77, width), the hidden state of each token times its weight.

        Each chunk is rescaled to the mean that it had before, so that weights shift emphasis and not the whole; a mean
        of nothing is left alone.
        """
        device = self._token_table.device
        ids = [[self._bos, *(token.id for token in chunk)] for chunk in chunks]
        weights = [[1.0, *(token.weight for token in chunk)] for chunk in chunks]
        states = self._hidden_states(torch.tensor(_filled(ids, self._eos), device=device), clip_skip)
        plain = states.float()
        weighted = plain * torch.tensor(_filled(weights, 1.0), device=device)[..., None]
        before, after = plain.mean((1, 2), keepdim=True), weighted.mean((1, 2), keepdim=True)
        vanishes = torch.minimum(before.abs(), after.abs()) < 1e-6
        return (weighted * torch.where(vanishes, 1.0, before / after)).to(states.dtype)

    def _hidden_states(self, ids: Tensor, clip_skip: int) -> Tensor:
        # The model takes ids only. For the time of this call its table of tokens goes on with the embeddings' vectors.
        table = self._token_table
        extended = torch.cat([table, *(vectors.to(table) for vectors in self._vectors)]) if self._vectors else table
        output = cast(
            "BaseModelOutputWithPooling",
            functional_call(
                self._text_encoder,
                {"embeddings.token_embedding.weight": extended},
                (ids,),
                {"output_hidden_states": True},
            ),
        )
        assert output.hidden_states is not None
        return self._text_encoder.final_layer_norm(output.hidden_states[-1 - clip_skip])


_Number = TypeVar("_Number", int, float)


def _filled(rows: list[list[_Number]], value: _Number) -> list[list[_Number]]:
    return [[*row, *[value] * (CHUNK_TOKENS + 2 - len(row))] for row in rows]
