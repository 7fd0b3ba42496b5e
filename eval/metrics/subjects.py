"""Score the generated images of one subject against its photos: DINO, CLIP-I and CLIP-T."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.metrics.embedding import embed
from eval.metrics.encoders import Encoders
from eval.metrics.generated import Generated
from eval.metrics.protocols import Protocol
from eval.metrics.scores import pair_scores, real_score, text_scores, without_identifier


def score_subject(
    generated: Generated,
    references: Sequence[Path],
    protocol: Protocol,
    encoders: Encoders,
    identifiers: Sequence[str],
    batch_size: int,
) -> dict[str, Any]:
    """The scores, the models they were computed with, and the scores of each image.

    Args:
        references: photos of the subject. identifiers: words to remove from the prompts for CLIP-T.

    Raises:
        InputError: an image cannot be read.
    """
    images = [path for path, _ in generated]
    prompts = [without_identifier(prompt, identifiers) for _, prompt in generated]
    features = embed([*images, *references], encoders.by_key(), batch_size=batch_size)
    dino_generated, dino_reference = features["dino"].split([len(images), len(references)])
    clip_generated, clip_reference = features["clip"].split([len(images), len(references)])
    unique = list(dict.fromkeys(prompts))
    texts = encoders.clip.encode_texts(unique).cpu()[[unique.index(prompt) for prompt in prompts]]
    per_image = {
        "dino": pair_scores(dino_generated, dino_reference),
        "clip_i": pair_scores(clip_generated, clip_reference),
        "clip_t": text_scores(clip_generated, texts),
    }
    return {
        "protocol": protocol.name,
        "source": protocol.source,
        "scores": {name: float(values.mean()) for name, values in per_image.items()},
        "real": {"dino": real_score(dino_reference), "clip_i": real_score(clip_reference)},
        "counts": {"generated": len(images), "reference": len(references), "prompts": len(unique)},
        "models": {
            "dino": encoders.dino_name,
            "dino_transform": str(encoders.dino.transform),
            "clip": encoders.clip_name,
            "clip_pretrained": protocol.clip_pretrained if encoders.clip_name == protocol.clip else None,
            "clip_transform": str(encoders.clip.transform),
            "precision": encoders.clip.precision,
        },
        "identifiers_removed": list(identifiers),
        "pictures": [
            {"file_name": path.name, "prompt": prompt, **{k: round(float(v[i]), 6) for k, v in per_image.items()}}
            for i, (path, prompt) in enumerate(generated)
        ],
    }
