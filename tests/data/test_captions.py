"""Captions: templates, orders of tags, and the share of captions that is dropped."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train_dreambooth_delora as script
from data.captions import ORDERS, tag_orders, with_instance
from data.concepts import Concept
from data.photographs import Photo
from delora_diffusers.errors import InputError
from delora_diffusers.families.latents import LatentScale
from delora_diffusers.names import INSTANCE
from delora_diffusers.training.batches import Bucket, Sample, SubjectBatches, SubjectData
from delora_diffusers.training.encoding import LatentCache, PromptTable
from tests.helpers import training_flags, write_photos

CPU = torch.device("cpu")
TAGS = st.lists(st.text("abc ", min_size=1, max_size=3).filter(str.strip), min_size=1, max_size=6)


@given(TAGS, st.integers(0, 7), st.integers(0, 99), st.sampled_from([", ", ",", " ,  ,"]))
def test_orders_are_permutations_that_keep_the_leading_tags(tags, keep, seed, separator):
    caption = separator.join(tags)
    tags = [tag.strip() for tag in tags]
    orders = tag_orders(caption, (seed, 3), keep)
    assert orders == tag_orders(caption, (seed, 3), keep)
    assert 1 <= len(orders) <= ORDERS and len(set(orders)) == len(orders)
    if len(tags) - keep < 2:
        assert orders == (caption,)
        return
    for order in orders:
        parts = order.split(", ")
        assert parts[:keep] == tags[:keep] and Counter(parts) == Counter(tags)


def test_orders_of_many_tags_are_random_and_depend_on_the_seed():
    caption = ", ".join("abcdefgh")
    orders = tag_orders(caption, (0, 0), 2)
    assert len(orders) == ORDERS and orders != tag_orders(caption, (0, 1), 2)
    assert {order.split(", ")[2] for order in orders} == set("cdefgh")  # missed with a probability below 0.04 ...
    assert {order[:6] for order in orders} == {"a, b, "}
    assert sorted(tag_orders("a, b", (1, 1))) == ["a, b", "b, a"]


def test_templates():
    assert with_instance("a photo", None, "x") == "a photo"
    assert with_instance(f"a {INSTANCE} and {INSTANCE}", "sks dog", "x") == "a sks dog and sks dog"
    for name in (None, "", "  "):
        with pytest.raises(InputError, match=r"^x contains \{instance\}, but no name was given; give --instance_name"):
            with_instance(f"a {INSTANCE}", name, "x")


def concept(*captions: str | None, **settings: Any) -> Concept:
    photos = [Photo(Path(f"{number}.png"), caption) for number, caption in enumerate(captions)]
    return Concept(photos, Path("photos"), **{"instance_prompt": None} | settings)


def test_captions_and_the_instance_prompt_are_templates():
    prompts = concept("{instance}, snow", None, instance_prompt="a {instance}", instance_name="sks dog").prompts
    assert prompts == ["sks dog, snow", "a sks dog"]
    with pytest.raises(InputError, match=r"the caption of 0\.png contains \{instance\}"):
        _ = concept("{instance}, snow").prompts
    with pytest.raises(InputError, match=r"--instance_prompt contains \{instance\}"):
        _ = concept(None, instance_prompt="a {instance}").prompts


def test_a_missing_name_is_refused_before_anything_is_written(tiny_sd, tmp_path):
    photos = write_photos(tmp_path / "photos", 2)
    (photos / "01.txt").write_text("{instance} in the snow")
    flags = training_flags(tiny_sd, photos, tmp_path / "out")
    with pytest.raises(InputError, match=r"the caption of .*01\.png contains \{instance\}"):
        script.main(flags)
    assert not (tmp_path / "out").exists()


def batches_of(prompts: Sequence[Sequence[str]], dropout: float, batch_size: int = 4, seed: int = 0) -> SubjectBatches:
    """Batches of photos whose latents are their number."""
    count = len(prompts)
    mean = torch.arange(float(count)).view(count, 1, 1, 1)
    cache = LatentCache(mean, torch.zeros_like(mean), list(range(count + 1)), LatentScale())
    samples = [Sample(number, prompts[number]) for number in range(count)]
    texts = ["", *dict.fromkeys(text for choices in prompts for text in choices)]
    table = PromptTable(texts, {"texts": torch.arange(len(texts))})

    def noising(latents: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"noisy": latents, "weights": torch.ones(len(latents))}

    data = [SubjectData(seed, [Bucket(samples, cache)])]
    return SubjectBatches(noising, data, table, batch_size, 1.0, CPU, caption_dropout=dropout)


def seen(batches: SubjectBatches, count: int) -> list[tuple[int, int]]:
    """(photo, text) of the samples of micro-batches."""
    rows = [batches(number) for number in range(count)]
    return [(int(p), int(t)) for row in rows for p, t in zip(row["noisy"].flatten(), row["texts"])]


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_a_share_of_the_captions_is_dropped(dropout):
    """Within four standard deviations, for every photo alike and independently of the micro-batches before."""
    prompts = [(f"photo {number}",) for number in range(5)]
    batches = batches_of(prompts, dropout)
    pairs = seen(batches, 500)
    assert all(text in (0, photo + 1) for photo, text in pairs)
    for photo in [None, *range(5)]:
        dropped = [text == 0 for number, text in pairs if photo in (None, number)]
        spread = math.sqrt(len(dropped) * dropout * (1 - dropout))
        assert abs(sum(dropped) - len(dropped) * dropout) < 4 * spread
    first = [dropped[0] == 0 for dropped in (batches(number)["texts"] for number in range(500))]
    pairs_of_neighbours = sum(a and b for a, b in itertools.pairwise(first))
    assert abs(pairs_of_neighbours - 499 * dropout**2) < 5 * math.sqrt(499 * dropout**2)
    again = batches_of(prompts, dropout)
    assert all(torch.equal(again(n)["texts"], batches(n)["texts"]) for n in (7, 3, 100))
    assert seen(batches_of(prompts, dropout, seed=1), 20) != pairs[:80]


def test_nothing_and_everything_is_dropped():
    prompts = [("a", "b"), ("c",)]
    assert {text for _, text in seen(batches_of(prompts, 0.0), 50)} == {1, 2, 3}
    assert {text for _, text in seen(batches_of(prompts, 1.0), 50)} == {0}


def test_dropping_changes_neither_photos_nor_noise_nor_the_order_that_is_chosen():
    prompts = [tuple("abcdef"), tuple("ghijkl")]
    plain, dropped = seen(batches_of(prompts, 0.0), 100), seen(batches_of(prompts, 0.4), 100)
    assert [photo for photo, _ in plain] == [photo for photo, _ in dropped]
    assert all(text in (0, other) for (_, other), (_, text) in zip(plain, dropped))
    counts = Counter(text for _, text in plain)
    assert len(counts) == 12 and max(counts.values()) < 2 * min(counts.values()) + 20


@pytest.mark.integration
@pytest.mark.parametrize("encoder", [False, True])
def test_every_shuffled_caption_and_no_caption_are_encoded_as_they_read(tiny_sd, tmp_path, monkeypatch, encoder):
    """What the denoiser is conditioned on in training is what the text encoder gives for one of the orders."""
    from delora_diffusers.families.loading import open_model
    from delora_diffusers.pipelines.conditions import encode_prompts
    from delora_diffusers.training import objective

    conditions: list[torch.Tensor] = []
    original = objective.denoising_losses

    def recording(*arguments: Any, **batch: Any) -> torch.Tensor:
        conditions.append(batch["encoder_hidden_states"].detach().clone())
        return original(*arguments, **batch)

    monkeypatch.setattr(objective, "denoising_losses", recording)
    photos = write_photos(tmp_path / "photos", 2)
    (photos / "00.txt").write_text("{instance}, red, on a table, at night")
    (photos / "01.caption").write_text("a toy alone")
    more = ["--shuffle_tags", "--keep_tags", 1, "--caption_dropout", 0.3, "--instance_name", "sks toy"]
    more += ["--train_text_encoder"] * encoder + ["--learning_rate", 1e-12, "--train_batch_size", 4]
    script.main(training_flags(tiny_sd, photos, tmp_path / "out", *more, "--lambda_learning_rate", 0.0))
    middle = ["red", "on a table", "at night"]
    texts = ["", "a toy alone"]
    texts += [f"sks toy, {a}, {b}, {c}" for a in middle for b in middle for c in middle if len({a, b, c}) == 3]
    model = open_model(str(tiny_sd))
    model.load("text_encoder", torch.float32)
    with torch.no_grad():
        table = encode_prompts(model.pipeline, texts, CPU)["encoder_hidden_states"]
    used = set()
    for row in torch.cat(conditions):
        distances = (table - row).flatten(1).abs().amax(1)
        assert distances.min() < 1e-5
        used.add(texts[int(distances.argmin())])
    assert {"", "a toy alone"} <= used and len(used) >= 5
