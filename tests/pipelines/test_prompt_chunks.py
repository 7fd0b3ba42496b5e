"""Prompts of more than 77 tokens: chunks against CLIP itself, and training and generating with them."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import train_controlnet_map2img
from data.concepts import Concept
from data.photographs import find_photographs
from data.subjects import Subject
from data.tiny_pipelines import write as write_transformer
from data.tiny_sd import write
from delora_diffusers.__main__ import main
from delora_diffusers.errors import InputError
from delora_diffusers.families.loading import load_pipeline, open_model
from delora_diffusers.families.table import FAMILIES, family_of
from delora_diffusers.names import WEIGHTS_NAME
from delora_diffusers.pipelines.conditions import (
    conditions,
    count_chunks,
    encode_prompts,
    first_chunks,
    tokenize,
    warn_of_truncation,
)
from delora_diffusers.pipelines.encoded_prompts import EncodedPrompts
from delora_diffusers.training.defaults import with_family_defaults
from tests.helpers import map_flags, run_in_child, train, training_flags, write_map_folders
from train_dreambooth_delora import count_trained_chunks, parse_arguments

CPU = torch.device("cpu")
BASE = "a photo of sks toys " + "abcde " * 12  # in the tiny models each letter is a token: 75
MIDDLE = BASE + "xy " + "abcde " * 9  # 122 tokens
LONG = BASE + "xy " + "abcde " * 15  # 152 tokens
SHORT = "a dog"


@pytest.fixture(scope="module")
def models(tiny_sd, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"sd1": tiny_sd, "sd2": write(folder / "sd2", kind="sd2"), "sdxl": write(folder / "xl", kind="sdxl")}


@functools.cache
def opened():
    """The miniature, whose tokenizer pads with another token than the one that ends a prompt."""
    return open_model(None)


def chunks_by_hand(tokenizer, prompt: str, count: int) -> list[list[int]]:
    words = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    start, end, padding = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    pieces = [words[75 * number : 75 * (number + 1)] for number in range(count)]
    return [[start, *piece, end] + [padding] * (75 - len(piece)) for piece in pieces]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["dog", "a", "xqz", "🐶", ","]), max_size=260), st.integers(2, 4))
@example(["dog"] * 75, 2)
@example(["dog"] * 76, 2)
@example(["dog"] * 150, 2)
@example(["dog"] * 151, 2)
def test_no_token_is_lost_or_repeated(words, most):
    pipeline, prompt = opened().pipeline, " ".join(words)
    tokenizer = pipeline.tokenizer
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    everything = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    (tokens,) = tokenize(pipeline, [prompt], CPU, ["text_encoder"], most)["text_encoder"]
    assert tokens.tolist() == chunks_by_hand(tokenizer, prompt, most)
    read = [word for row in tokens.tolist() for word in row[1 : row.index(tokenizer.eos_token_id)]]
    assert read == everything[: 75 * most]
    needed = count_chunks(pipeline, [SHORT, prompt, ""], most)
    assert 75 * (needed - 1) < max(1, len(read)) <= max(1, 75 * needed)
    assert count_chunks(pipeline, [prompt], 1) == 1


@torch.no_grad()
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_chunks_are_encoded_as_clip_encodes_each(models, kind, count):
    folder = models[kind]
    ours = encode_prompts(load_pipeline(str(folder)), [SHORT, LONG], CPU, count)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    for row, prompt in enumerate((SHORT, LONG)):
        pieces = [torch.tensor([ids]) for ids in chunks_by_hand(tokenizer, prompt, count)]
        first = CLIPTextModel.from_pretrained(folder / "text_encoder")
        if kind == "sdxl":
            second = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2")
            both = [[clip(ids, output_hidden_states=True) for ids in pieces] for clip in (first, second)]
            expected = torch.cat([torch.cat([out.hidden_states[-2][0] for out in outs]) for outs in both], dim=-1)
            torch.testing.assert_close(ours["text_embeds"][row], both[1][0].text_embeds[0], atol=1e-6, rtol=1e-5)
        else:
            expected = torch.cat([first(ids).last_hidden_state[0] for ids in pieces])
        assert expected.shape[0] == 77 * count
        torch.testing.assert_close(ours["encoder_hidden_states"][row], expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_the_first_chunks_are_those_of_fewer(models):
    pipeline = load_pipeline(str(models["sdxl"]))
    three, two = (encode_prompts(pipeline, [SHORT, LONG], CPU, count) for count in (3, 2))
    kept = first_chunks(three, 2, 3)
    assert kept.keys() == two.keys()
    for name, tensor in two.items():
        torch.testing.assert_close(kept[name], tensor, atol=1e-6, rtol=1e-5)
    tokens = tokenize(pipeline, [SHORT, LONG], CPU, chunks=2)
    for name, tensor in conditions(pipeline, tokens, pipeline.unet.config).items():
        torch.testing.assert_close(tensor, two[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_prompt_is_padded_only_to_the_length_of_its_negative_prompt(models, kind):
    def encoded(prompt: str, negative: str, most: int, beside: str = LONG) -> dict[str, torch.Tensor]:
        used = [(text, []) for text in (prompt, beside)]
        prompts = EncodedPrompts(open_model(str(models[kind])), [], used, negative, CPU, torch.float32, most)
        return prompts.arguments([prompt], [], CPU)

    short, same = encoded(BASE, "", 1), encoded(BASE, "", 3)
    assert short["prompt_embeds"].shape[1] == 77
    assert all(torch.equal(same[name], tensor) for name, tensor in short.items())
    longer = encoded(BASE, LONG, 3)
    assert longer["prompt_embeds"].shape == longer["negative_prompt_embeds"].shape
    assert longer["prompt_embeds"].shape[1] == 3 * 77 and longer["prompt_embeds"][:, 77:].abs().min(dim=2).values.all()
    torch.testing.assert_close(longer["prompt_embeds"][:, :77], short["prompt_embeds"])


def test_what_is_not_read_is_said_and_how_to_read_it(models, caplog):
    pipeline = load_pipeline(str(models["sd1"]))
    for chunks in (1, 2, 3):
        warn_of_truncation(pipeline, [SHORT, LONG], chunks)
    one, two = caplog.messages
    assert "has 154 tokens, of which 77 are read; not read: 'xy abcde" in one
    assert "has 154 tokens, of which 152 are read; not read: 'de'" in two
    assert all(message.endswith("use --max_prompt_chunks 3 to read everything.") for message in (one, two))


@pytest.mark.parametrize("pipeline_class", list(FAMILIES))
def test_families_that_read_long_prompts_refuse_chunks(pipeline_class):
    family = family_of(pipeline_class)
    args = parse_arguments(["--pretrained_model_name_or_path", "some/model", "--max_prompt_chunks", "2"])
    if set(family.TRAINABLE_ENCODERS) == set(family.TEXT_ENCODERS):
        assert with_family_defaults(args, family).max_prompt_chunks == 2
    else:
        with pytest.raises(InputError, match="--max_prompt_chunks 2 is for .* which some/model is not; leave it out"):
            with_family_defaults(args, family)


def test_generate_refuses_what_it_cannot_read(tmp_path):
    folder = write_transformer(tmp_path / "zimage", "zimage")
    flags = ["--prompt", "x", "--output_dir", str(tmp_path / "o"), "--pretrained_model_name_or_path", str(folder)]
    for count, message in (("2", "--max_prompt_chunks 2 is for Stable"), ("0", "--max_prompt_chunks is 0; give at")):
        with pytest.raises(SystemExit, match=message):
            main(["generate", *flags, "--max_prompt_chunks", count])
    assert not (tmp_path / "o").exists()


def test_subjects_of_different_lengths_are_refused(models, photographs):
    photos = find_photographs(photographs)
    subjects = [Subject([Concept(photos, photographs, text)], Path(name)) for name, text in (("a", "x"), ("b", LONG))]
    pipeline = open_model(str(models["sd1"])).pipeline
    args = parse_arguments(["--max_prompt_chunks", "2"])
    assert count_trained_chunks(args, subjects[1:], pipeline) == 2
    with pytest.raises(InputError, match="the prompts of a fill 1 chunks and those of b 2; train these"):
        count_trained_chunks(args, subjects, pipeline)


@pytest.mark.integration
def test_an_image_does_not_depend_on_the_other_prompts_of_its_run(models, tmp_path):
    def generated(name: str, *more: str) -> dict[str, np.ndarray]:
        flags = ["--pretrained_model_name_or_path", models["sdxl"], "--num_inference_steps", 2, "--num_images", 1]
        main(["generate", *map(str, flags), "--output_dir", str(tmp_path / name), *more])
        records = [json.loads(line) for line in (tmp_path / name / "metadata.jsonl").read_text().splitlines()]
        assert all(record.get("max_prompt_chunks", 1) == (3 if "3" in more else 1) for record in records)
        return {r["prompt"]: np.asarray(Image.open(tmp_path / name / r["file_name"])).astype(int) for r in records}

    chunks = ("--max_prompt_chunks", "3")
    together = generated("together", "--prompt", SHORT, LONG, LONG[:-3], "a cat", *chunks)
    alone = generated("alone", "--prompt", SHORT, "a cat")
    cut = generated("cut", "--prompt", LONG, LONG[:-3])
    assert all(np.abs(together[prompt] - alone[prompt]).max() <= 1 for prompt in alone)
    assert np.array_equal(cut[LONG], cut[LONG[:-3]]) and np.abs(together[LONG] - cut[LONG]).max() > 1
    assert not np.array_equal(together[LONG], together[LONG[:-3]])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS_NAME)


def equal(one: Path, other: Path) -> bool:
    return all(torch.equal(tensor, tensors(other)[name]) for name, tensor in tensors(one).items())


@pytest.mark.integration
def test_training_reads_the_whole_caption_and_resumes(models, photographs, tmp_path):
    def run(name: str, prompt: str, *more: object) -> Path:
        flags = ["--instance_prompt", prompt, "--max_train_steps", 2, "--checkpointing_steps", 1, *more]
        run_in_child(train, training_flags(models["sd1"], photographs, tmp_path / name, *flags))
        return tmp_path / name

    chunks = ("--max_prompt_chunks", 3)
    cut = run("cut", MIDDLE)
    whole = run("whole", MIDDLE, *chunks)
    # Also with a validation prompt that needs more chunks than the caption.
    validation = ("--validation_prompt", LONG, "--num_validation_images", 1, "--validation_inference_steps", 1)
    other_end, validated = run("other", MIDDLE[:-2] + "q", *chunks), run("validated", MIDDLE, *chunks, *validation)
    assert not equal(whole, cut) and not equal(whole, other_end)
    for name, tensor in tensors(whole).items():
        torch.testing.assert_close(tensors(validated)[name], tensor, atol=1e-5, rtol=1e-4)
    assert "--max_prompt_chunks 3" in (whole / "README.md").read_text()

    expected = (whole / WEIGHTS_NAME).read_bytes()
    remove_end(whole)
    with pytest.raises(AssertionError, match="trained with --max_prompt_chunks 3, but --max_prompt_chunks is now 2"):
        run("whole", MIDDLE, "--max_prompt_chunks", 2, "--resume_from_checkpoint", "latest")
    run("whole", MIDDLE, *chunks, "--resume_from_checkpoint", "latest")
    assert (whole / WEIGHTS_NAME).read_bytes() == expected

    flags = ["--num_inference_steps", 2, "--num_images", 1, "--prompt", MIDDLE, "--output_dir", tmp_path / "images"]
    main(["generate", "--adapter", *map(str, [whole, *flags, *chunks])])
    (record,) = (tmp_path / "images" / "metadata.jsonl").read_text().splitlines()
    assert json.loads(record)["max_prompt_chunks"] == 3


def remove_end(run: Path) -> None:
    """Leave a run of two steps as if it had been killed after the first."""
    (run / WEIGHTS_NAME).unlink()
    shutil.rmtree(run / "checkpoint-2")


@pytest.mark.integration
def test_text_encoders_are_trained_on_all_chunks(models, photographs, tmp_path):
    def run(name: str, prompt: str, *more: object) -> Path:
        flags = ["--instance_prompt", prompt, "--train_text_encoder", "--max_train_steps", 2]
        flags += ["--checkpointing_steps", 1, "--max_prompt_chunks", 3, "--gradient_checkpointing"]
        flags += ["--with_prior_preservation", "--class_prompt", "a toy", "--num_class_images", 1]
        flags += ["--class_data_dir", tmp_path / "class", "--validation_inference_steps", 1, *more]
        run_in_child(train, training_flags(models["sdxl"], photographs, tmp_path / name, *flags))
        return tmp_path / name

    whole, other = run("whole", MIDDLE), run("other", MIDDLE[:-2] + "q")
    for component in ("unet", "text_encoder", "text_encoder_2"):
        names = [name for name in tensors(whole) if name.startswith(f"{component}.") and name.endswith("delora_B")]
        assert names and not all(torch.equal(tensors(whole)[name], tensors(other)[name]) for name in names)
    expected = (whole / WEIGHTS_NAME).read_bytes()
    remove_end(whole)
    # A validation prompt may be added when a run is resumed. It needs more chunks, which must not change the training.
    validation = ("--validation_prompt", LONG, "--num_validation_images", 1)
    run("whole", MIDDLE, *validation, "--resume_from_checkpoint", "latest")
    assert (whole / WEIGHTS_NAME).read_bytes() == expected


@pytest.mark.integration
def test_captions_of_maps_are_cached_by_their_chunks(models, tmp_path):
    pairs = write_map_folders(tmp_path / "pairs")

    def shapes(name: str, *more: object) -> set[int]:
        flags = map_flags(models["sd1"], pairs, tmp_path / name, "--cache_dir", tmp_path / "cache", *more)
        run_in_child(train_controlnet_map2img.main, [*flags, "--max_train_steps", "2"])
        return {load_file(file)["embeddings"].shape[1] for file in (tmp_path / "cache").glob("*/*.safetensors")}

    chunks = ("--max_prompt_chunks", 3, "--proportion_empty_prompts", 0.5)
    assert shapes("short") == shapes("short-chunks", *chunks) == {77}
    assert len(list((tmp_path / "cache").iterdir())) == 1
    (pairs / "images" / "a.txt").write_text(LONG)
    assert shapes("whole", *chunks, "--num_validation_images", 1) == {77, 3 * 77}
    assert shapes("cut") == {77, 3 * 77} and len(list((tmp_path / "cache").iterdir())) == 3
    # A validation caption that needs more chunks than those trained on, with empty prompts in training.
    (pairs / "images" / "a.txt").write_text("scene a")
    others = write_map_folders(tmp_path / "others")
    (others / "images" / "a.txt").write_text(LONG)
    assert shapes("validated", *chunks, "--proportion_empty_prompts", 1, "--validation_data_dir", others)
    assert (tmp_path / "validated" / WEIGHTS_NAME).is_file()
