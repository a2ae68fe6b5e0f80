"""The language of prompts, and what the UNet attends to because of them."""

import logging
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from core.errors import DeploymentError
from tests import tiny
from tests.tiny import CONTEXT_WIDTH
from worker.upscaler.prompts import (
    CHUNK_TOKENS,
    MAX_WEIGHT,
    Fragment,
    Lora,
    PromptEncoder,
    extract_loras,
    load_embeddings,
    parse,
)

COMPONENTS = tiny.components()
TEXT_ENCODER, TOKENIZER = COMPONENTS.text_encoder, COMPONENTS.tokenizer
BOS, EOS = len(TOKENIZER) - 2, len(TOKENIZER) - 1
# Untrained, the last norm takes every token's mean away, and weights could not shift it.
nn.init.uniform_(TEXT_ENCODER.final_layer_norm.bias, 0, 0.5, torch.Generator().manual_seed(0))
ENCODER = PromptEncoder(TOKENIZER, TEXT_ENCODER, {})


def tokens(text: str) -> list[int]:
    """Tokenise words of "the" and single letters, by the vocabulary."""
    vocabulary = TOKENIZER.get_vocab()
    return [vocabulary[f"{word}</w>"] for word in re.findall(r"the|\S", text)]


def states(*chunks: list[int], clip_skip: int = 0) -> Tensor:
    """Encode chunks by the text encoder alone, one row for each."""
    ids = torch.tensor([[BOS, *chunk, *[EOS] * (76 - len(chunk))] for chunk in chunks])
    output = TEXT_ENCODER(ids, output_hidden_states=True)
    assert output.hidden_states is not None and output.last_hidden_state is not None
    if not clip_skip:
        return output.last_hidden_state
    return TEXT_ENCODER.final_layer_norm(output.hidden_states[-1 - clip_skip])


@pytest.mark.parametrize(
    ("prompt", "fragments"),
    [
        ("a cat", [("a cat", 1)]),
        ("a (red) cat", [("a ", 1), ("red", 1.1), (" cat", 1)]),
        ("((x))", [("x", 1.21)]),
        ("[x]", [("x", 1 / 1.1)]),
        ("[[x]]", [("x", 1 / 1.21)]),
        ("([x])", [("x", 1)]),
        ("(x:1.3)", [("x", 1.3)]),
        ("(x: 1.3 )", [("x", 1.3)]),
        ("(x:-0.5)", [("x", -0.5)]),
        ("(x:.5)", [("x", 0.5)]),
        ("(x:+2.)", [("x", 2)]),
        ("(x:0)y", [("x", 0), ("y", 1)]),
        ("(a(b:1.5)c:2)", [("a", 2), ("b", 3), ("c", 2)]),
        ("(a[b)c]", [("a", 1.1), ("b", 1), ("c", 1 / 1.1)]),
    ],
)
def test_brackets_weigh_what_they_enclose(prompt: str, fragments: list[tuple[str, float]]) -> None:
    parsed = parse(prompt)
    assert [fragment.text for fragment in parsed] == [text for text, _ in fragments]
    assert [fragment.weight for fragment in parsed] == pytest.approx([weight for _, weight in fragments])


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (r"\(x\)", "(x)"),
        (r"\[x\]", "[x]"),
        (r"\\", "\\"),
        (r"a\b", r"a\b"),
        ("\\", "\\"),
        ("x)", "x)"),
        ("x]", "x]"),
        ("x:1.3)", "x:1.3)"),
        ("16:9", "16:9"),
        ("a\nb", "a\nb"),
        ("BREAKFAST", "BREAKFAST"),
        ("break", "break"),
    ],
)
def test_what_is_escaped_or_closes_nothing_is_text(prompt: str, text: str) -> None:
    assert parse(prompt) == [Fragment(text)]


@pytest.mark.parametrize("prompt", ["(x:1.0)", "(x:1)", "((x:2):0.5)"])
def test_weight_one_is_plain_text(prompt: str) -> None:
    assert parse(f"a {prompt} b") == parse("a x b") == [Fragment("a x b")]


def test_a_bracket_that_is_never_closed_holds_to_the_end() -> None:
    assert parse("a (b c") == [Fragment("a "), Fragment("b c", 1.1)]
    assert parse("[b (c:2)") == [Fragment("b ", 1 / 1.1), Fragment("c", 2 / 1.1)]


def test_a_weight_that_is_no_number_is_text() -> None:
    assert parse("(x:heavy)") == [Fragment("x:heavy", 1.1)]
    assert parse("(x:1.2.3)") == [Fragment("x:1.2.3", 1.1)]


@pytest.mark.parametrize("prompt", ["[a:b:0.5]", "[a|b]"])
def test_scheduling_and_alternation_are_text_in_square_brackets(prompt: str) -> None:
    assert parse(prompt) == [Fragment(prompt[1:-1], 1 / 1.1)]


def test_weights_stay_within_what_half_precision_holds() -> None:
    assert parse(f"(x:{'9' * 500})") == [Fragment("x", MAX_WEIGHT)]
    assert parse("(" * 200 + "x") == [Fragment("x", MAX_WEIGHT)]
    assert parse(f"(((x:0):{'9' * 500}):-{'9' * 500})") == [Fragment("x", 0)]


def test_break_ends_a_chunk_and_swallows_the_space_around_it() -> None:
    assert parse("a, BREAK  b") == [Fragment("a,", ends_chunk=True), Fragment("b")]
    assert parse("(a BREAK b:2)c") == [Fragment("a", 2, ends_chunk=True), Fragment("b", 2), Fragment("c")]
    assert parse("BREAK") == [Fragment("", ends_chunk=True)]


@given(st.text(st.characters(exclude_characters="\\()[]"), min_size=1).filter(lambda text: "BREAK" not in text))
def test_plain_text_is_returned_whole(text: str) -> None:
    assert parse(text) == [Fragment(text)]


@given(
    st.text(st.sampled_from("ab \\()[]:1.-\n") | st.characters())
    | st.lists(st.sampled_from(["BREAK", " ", "(", ")", ":1.5)", ":-2)", "[", "]", "\\", "a", "é", ":"])).map("".join)
)
def test_no_prompt_fails_or_loses_a_letter(prompt: str) -> None:
    fragments = parse(prompt)
    # Digits, signs and brackets may be weights; all else must still be there, and in order.
    kept = re.sub(r"\bBREAK\b|[\s\\()\[\]:\d.+-]", "", prompt)
    assert re.sub(r"[\s\\()\[\]:\d.+-]", "", "".join(fragment.text for fragment in fragments)) == kept
    assert all(abs(fragment.weight) <= MAX_WEIGHT for fragment in fragments)


@given(st.text(st.sampled_from("()[]:1.a")))
def test_neighbours_differ_in_weight(prompt: str) -> None:
    weights = [fragment.weight for fragment in parse(prompt)]
    assert all(left != right for left, right in pairwise(weights))


def test_loras_are_taken_out_of_the_prompt_in_order() -> None:
    prompt = "a <lora:more_details:0.5>cat, <lora:SDXLrender_v2.0:1><lora:with space>"
    text, loras = extract_loras(prompt)
    assert text == "a cat, "
    assert loras == [Lora("more_details", 0.5, 0.5), Lora("SDXLrender_v2.0", 1, 1), Lora("with space", 1, 1)]


def test_of_two_weights_the_first_is_the_text_encoders() -> None:
    assert extract_loras("<lora:x:0.25:-.75>") == ("", [Lora("x", unet_weight=-0.75, text_weight=0.25)])


@pytest.mark.parametrize("prompt", ["<lora:>", "<lora:x:heavy>", "<lora:x", "<hypernet:x:1>", "<lora:x:1:2:3>"])
def test_what_does_not_read_as_a_lora_stays_text(prompt: str) -> None:
    assert extract_loras(prompt) == (prompt, [])


def test_plain_prompts_are_encoded_as_by_the_text_encoder_alone() -> None:
    conditioning = ENCODER.encode("the cat", "the the")
    letters = [TOKENIZER.get_vocab()[piece] for piece in ("c", "a", "t</w>")]
    positive, negative = states([*tokens("the"), *letters], tokens("the the"))
    assert torch.equal(conditioning.positive, positive[None])
    assert torch.equal(conditioning.negative, negative[None])


def test_the_result_is_in_the_text_encoders_precision() -> None:
    half = tiny.components()
    nn.Module.to(half.text_encoder, torch.bfloat16)
    vectors = {"fluffy": torch.randn(3, CONTEXT_WIDTH)}
    conditioning = PromptEncoder(half.tokenizer, half.text_encoder, vectors).encode("(fluffy:1.5) cat", "")
    assert conditioning.positive.dtype == conditioning.negative.dtype == torch.bfloat16


def test_an_empty_prompt_is_one_empty_chunk() -> None:
    conditioning = ENCODER.encode("", " BREAK ")
    assert conditioning.positive.shape == (1, 77, CONTEXT_WIDTH)
    assert torch.equal(conditioning.positive, conditioning.negative)
    torch.testing.assert_close(conditioning.positive, states([]))


@pytest.mark.parametrize(("words", "chunks"), [(1, 1), (75, 1), (76, 2), (150, 2), (151, 3)])
def test_long_prompts_are_encoded_in_chunks_along_the_tokens(words: int, chunks: int) -> None:
    conditioning = ENCODER.encode("the " * words, "")
    assert conditioning.positive.shape == (1, 77 * chunks, CONTEXT_WIDTH)
    last = states(tokens("the " * (words - 75 * (chunks - 1))))
    torch.testing.assert_close(conditioning.positive[:, -77:], last)


def test_the_shorter_prompt_is_filled_up_with_empty_chunks() -> None:
    for shorter, longer in (("the", "the " * 80), ("the " * 80, "the")):
        conditioning = ENCODER.encode(shorter, longer)
        assert conditioning.positive.shape == conditioning.negative.shape == (1, 154, CONTEXT_WIDTH)
    torch.testing.assert_close(conditioning.negative, states(tokens("the"), []).reshape(1, 154, -1))


def test_long_prompts_are_read_without_a_word_of_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        ENCODER.encode("the " * 200, "")
    assert not caplog.records


@pytest.mark.parametrize(
    ("before", "moved"),
    [(54, 0), (55, 19), (60, 14), (74, 0)],
    ids=["comma too far back", "comma just near enough", "comma near", "comma last"],
)
def test_a_chunk_is_cut_after_a_comma_that_is_near(before: int, moved: int) -> None:
    prompt = "the " * before + ", " + "a " * (80 - before - 1)
    conditioning = ENCODER.encode(prompt, "")
    ids = tokens(prompt)
    expected = states(ids[: 75 - moved], ids[75 - moved :])
    torch.testing.assert_close(conditioning.positive, expected.reshape(1, 154, -1))


def test_of_several_commas_the_last_one_ends_the_chunk() -> None:
    prompt = "the " * 58 + ", the the , " + "a " * 20
    ids = tokens(prompt)
    expected = states(ids[:62], ids[62:]).reshape(1, 154, -1)
    torch.testing.assert_close(ENCODER.encode(prompt, "").positive, expected)


def test_break_begins_a_new_chunk_and_never_an_empty_one() -> None:
    expected = states(tokens("the"), tokens("a")).reshape(1, 154, -1)
    for prompt in ("the BREAK a", "BREAK the BREAK BREAK a", "the BREAK a BREAK"):
        torch.testing.assert_close(ENCODER.encode(prompt, "").positive, expected)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.3, -1.0])
def test_a_weight_multiplies_its_tokens_and_keeps_the_chunks_mean(weight: float) -> None:
    positive = ENCODER.encode(f"the (a:{weight}) the BREAK the", "").positive[0]
    plain = states(tokens("the a the"), tokens("the"))
    weighted = plain.clone()
    weighted[0, 2] *= weight
    weighted *= (plain.mean((1, 2)) / weighted.mean((1, 2)))[:, None, None]
    torch.testing.assert_close(positive, weighted.reshape(154, -1))
    torch.testing.assert_close(positive[:77].mean(), plain[0].mean())


def test_weights_leave_the_proportions_of_all_other_tokens() -> None:
    ratio = ENCODER.encode("the (a:1.7) the", "").positive / ENCODER.encode("the a the", "").positive
    others = torch.cat([ratio[0, :2], ratio[0, 3:]])
    torch.testing.assert_close(others, others[0, 0].expand_as(others))
    torch.testing.assert_close(ratio[0, 2] / others[0], torch.full((CONTEXT_WIDTH,), 1.7))


def test_a_mean_of_nothing_is_left_alone() -> None:
    silent = tiny.components()
    silent.text_encoder.final_layer_norm.weight.data.zero_()
    silent.text_encoder.final_layer_norm.bias.data.zero_()
    encoder = PromptEncoder(silent.tokenizer, silent.text_encoder, {})
    assert not encoder.encode("the (a:1.5)", "").positive.any()


@pytest.mark.parametrize("clip_skip", [0, 1, 2])
def test_clip_skip_leaves_out_the_last_layers_but_not_the_norm(clip_skip: int) -> None:
    positive = ENCODER.encode("the a", "", clip_skip).positive
    expected = states(tokens("the a"), [], clip_skip=clip_skip)[:1]
    assert torch.equal(positive, expected)
    if clip_skip:
        assert not torch.allclose(positive, ENCODER.encode("the a", "").positive)


def spliced(vectors: dict[str, Tensor], prompt: str) -> Tensor:
    return PromptEncoder(TOKENIZER, TEXT_ENCODER, vectors).encode(prompt, "").positive


def vectors_of(*words: str) -> Tensor:
    """Look up the vectors of words: an embedding made of these must read as the words."""
    return TEXT_ENCODER.embeddings.token_embedding.weight[tokens(" ".join(words))]


@pytest.mark.parametrize(
    "prompt", ["a bad-hands_5 b", "a BAD-hands_5 b", "a, bad-hands_5, b", "a (bad-hands_5:1.4) b", "bad-hands_5"]
)
def test_an_embeddings_name_stands_for_its_vectors(prompt: str) -> None:
    vectors = {"Bad-Hands_5": vectors_of("the", "q", "z"), "hands": vectors_of("x")}
    words = re.sub("bad-hands_5", "the q z", prompt, flags=re.IGNORECASE)
    torch.testing.assert_close(spliced(vectors, prompt), ENCODER.encode(words, "").positive)


@pytest.mark.parametrize("prompt", ["abad", "bade", "bad_"])
def test_a_name_within_a_word_is_no_embedding(prompt: str) -> None:
    torch.testing.assert_close(spliced({"bad": vectors_of("x")}, prompt), ENCODER.encode(prompt, "").positive)


def test_of_two_names_that_fit_the_longer_one_counts() -> None:
    vectors = {"bad": vectors_of("x"), "bad hands": vectors_of("y"), "hands": vectors_of("z")}
    torch.testing.assert_close(spliced(vectors, "bad hands bad"), ENCODER.encode("y x", "").positive)


def test_an_embedding_is_never_divided_between_chunks() -> None:
    vectors = {"bad": vectors_of("x", "y", "z")}
    conditioning = spliced(vectors, "the " * 60 + ", " + "the " * 12 + "bad")
    expected = states(tokens("the " * 60 + ", " + "the " * 12), tokens("x y z"))
    torch.testing.assert_close(conditioning, expected.reshape(1, 154, -1))
    assert spliced({"bad": torch.ones(CHUNK_TOKENS, CONTEXT_WIDTH)}, "the bad the").shape[1] == 3 * 77


def test_embeddings_leave_the_text_encoder_as_it_was() -> None:
    table = TEXT_ENCODER.embeddings.token_embedding.weight
    before = table.clone()
    spliced({"bad": torch.randn(3, CONTEXT_WIDTH)}, "the bad")
    assert TEXT_ENCODER.embeddings.token_embedding.weight is table
    assert torch.equal(table, before)


def test_embeddings_are_read_in_the_formats_there_are(tmp_path: Path) -> None:
    wanted = {name: torch.randn(3, CONTEXT_WIDTH) for name in ("web.v1", "xl", "diffusers", "single")}
    wanted["single"] = wanted["single"][:1]
    save_file({"emb_params": wanted["web.v1"], "step": torch.ones(1)}, tmp_path / "web.v1.safetensors")
    save_file({"clip_g": torch.ones(3, 40), "clip_l": wanted["xl"]}, tmp_path / "xl.safetensors")
    save_file({"<concept>": wanted["diffusers"]}, tmp_path / "diffusers.safetensors")
    save_file({"<concept>": wanted["single"][0].clone()}, tmp_path / "single.safetensors")
    (tmp_path / "pickle.pt").write_bytes(b"never opened")
    found = load_embeddings(tmp_path, CONTEXT_WIDTH)
    assert found.keys() == wanted.keys()
    for name, vectors in wanted.items():
        assert torch.equal(found[name], vectors)


def test_a_folder_that_does_not_exist_has_no_embeddings(tmp_path: Path) -> None:
    assert load_embeddings(tmp_path / "none", CONTEXT_WIDTH) == {}


@pytest.mark.parametrize(
    "tensors",
    [
        {"emb_params": torch.ones(3, CONTEXT_WIDTH + 1)},
        {"emb_params": torch.ones(CHUNK_TOKENS + 1, CONTEXT_WIDTH)},
        {"emb_params": torch.ones(0, CONTEXT_WIDTH)},
        {"emb_params": torch.ones(1, 3, CONTEXT_WIDTH)},
        {"a": torch.ones(1, CONTEXT_WIDTH), "b": torch.ones(1, CONTEXT_WIDTH)},
        {},
    ],
    ids=["width", "too many", "none", "dimensions", "ambiguous", "empty"],
)
def test_an_embedding_that_does_not_fit_is_refused_by_name(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, tmp_path / "wrong.safetensors")
    with pytest.raises(DeploymentError, match=r"wrong\.safetensors does not fit"):
        load_embeddings(tmp_path, CONTEXT_WIDTH)


def test_a_damaged_embedding_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(DeploymentError, match=r"torn\.safetensors cannot be read"):
        load_embeddings(tmp_path, CONTEXT_WIDTH)
