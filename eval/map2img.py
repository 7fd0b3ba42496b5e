"""Score pictures drawn from semantic maps: mIoU, accuracies, and the Frechet distance to real pictures."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.errors import InputError
from data.maps import MapPair, find_pairs, pair_views
from data.miniature import MINI_DINO, MINI_SEGMENTER
from data.palettes import IGNORED, generated, indices_of, read_palette
from data.photographs import load_rgb
from eval.writing import write_text, written_whole

ADE20K_SEGMENTER = "openmmlab/upernet-convnext-small"
FEATURES = ("inception", "dino", "none")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--generated_dir", type=Path, required=True, help="pictures of generate --map_dir")
    parser.add_argument("--map_dir", type=Path, required=True, help="the maps, beside the real pictures of the scenes")
    parser.add_argument("--protocol", choices=("ade20k", "toybox"), default="ade20k", help="defaults of what follows")
    parser.add_argument("--segmenter", help="a transformers segmentation model: folder or hub id")
    parser.add_argument(
        "--label_map", type=Path, help="JSON: the model's class for each class of the maps that differs"
    )
    parser.add_argument("--ignore_index", type=int, default=IGNORED, help="class of the maps that does not count")
    parser.add_argument("--reduce_labels", action="store_true", help="index 0 is no class, i is class i - 1 (ADE20K)")
    parser.add_argument("--palette", help="of maps in colour: ade20k, generated or a file")
    parser.add_argument("--frechet_features", choices=FEATURES, help="inception makes the distance the FID")
    parser.add_argument("--inception_weights", type=Path, help="file of torch-fidelity's Inception weights")
    parser.add_argument("--dino", help="encoder for --frechet_features dino: timm name, hf-hub:ID or local-dir:FOLDER")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write; a sheet goes beside")


def read_drawn(folder: Path, map_dir: Path) -> list[tuple[Path, MapPair]]:
    """(picture, the pair whose map it was drawn from) of each line of a folder's ``metadata.jsonl``.

    Raises:
        InputError: no metadata, pictures that were not drawn from maps, or from others than those of ``map_dir``.
    """
    file = folder / "metadata.jsonl"
    if not file.is_file():
        raise InputError(f"{file} is missing; --generated_dir wants a finished output folder of generate --map_dir.")
    pairs = {Path(str(pair.map)).stem: pair for pair in find_pairs(map_dir)}
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            path, stem = folder / record["file_name"], Path(record["map"]).stem
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file} line {number} names no map; generate the pictures with --map_dir.") from error
        if stem not in pairs:
            raise InputError(
                f"{path} was drawn from a map {stem}, which {map_dir} has not; name the folder it came from."
            )
        if not path.is_file():
            raise InputError(f"{path} is missing, though {file.name} names it; run generate again to draw it.")
        found.append((path, pairs[stem]))
    if not found:
        raise InputError(f"{file} is empty; generate pictures first.")
    return found


def read_label_map(file: Path | None) -> dict[int, int]:
    """The model's class for each class of the maps that differs.

    Raises:
        InputError: not a JSON object of whole numbers.
    """
    if file is None:
        return {}
    try:
        return {int(ours): int(theirs) for ours, theirs in json.loads(file.read_text()).items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f'--label_map {file} is not a JSON object like {{"0": 2, "1": 1}} ({error}); mend it.'
        ) from error


class Truth:
    """The maps as the model's class indices, fitted to the pictures."""

    def __init__(self, options: argparse.Namespace):
        self.reduce_labels, self.ignore_index = options.reduce_labels, options.ignore_index
        self.palette = read_palette(options.palette) if options.palette else None
        self.names = read_label_map(options.label_map)
        self.lookup = np.arange(256, dtype=np.uint8)
        for ours, theirs in self.names.items():
            self.lookup[ours] = theirs

    def of(self, pair: MapPair, side: int) -> tuple[np.ndarray, Image.Image | None]:
        """(class indices (side, side), the real picture cut alike or None)."""
        values = pair.load_map(self.reduce_labels)
        if values.ndim == 3:
            if self.palette is None:
                raise InputError(f"the map of {pair.name} is in colour; name its --palette, to know its classes.")
            values = indices_of(values, self.palette, f"the map of {pair.name}")
        picture = pair.load_picture() if pair.picture is not None else Image.new("RGB", values.shape[1::-1])
        cut, semantic = pair_views(picture, values, side, None, False)[0]
        truth = np.where(semantic == self.ignore_index, IGNORED, self.lookup[semantic])
        return truth, None if pair.picture is None else Image.fromarray(cut)


class Segmenter:
    """A transformers semantic-segmentation model with its preprocessing.

    Raises:
        InputError: it cannot be loaded.
    """

    def __init__(self, name: str, device: Any):
        from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

        try:
            self.model: Any = AutoModelForSemanticSegmentation.from_pretrained(name).float().eval().to(device)
            self.processor: Any = AutoImageProcessor.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"--segmenter {name} could not be loaded ({reason}); name a folder or hub id of a transformers "
                "segmentation model."
            ) from error
        self.classes = int(self.model.config.num_labels)
        self.labels: dict[int, str] = self.model.config.id2label
        self.device = device

    def __call__(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Class indices (pictures, height, width) of pictures of one size."""
        import torch

        sizes = [(picture.height, picture.width) for picture in pictures]
        with torch.inference_mode():
            output = self.model(**self.processor(images=list(pictures), return_tensors="pt").to(self.device))
            found = self.processor.post_process_semantic_segmentation(output, sizes)
        return torch.stack(found).cpu().numpy()


Ranked = list[tuple[str, Path, MapPair]]
"""(its score in words, picture, pair) of each picture from the worst to the best."""


def score(options: argparse.Namespace) -> tuple[dict[str, Any], Ranked, Segmenter] | None:
    """The scores, the pictures in their order, and the segmenter that they were made with.

    Spread over the processes of ``accelerate launch``; on all but the main one the result is None.

    Raises:
        InputError: input that cannot be read, a model that cannot be loaded.
    """
    drawn = read_drawn(options.generated_dir, options.map_dir)
    truth_of = Truth(options)
    if options.batch_size < 1:
        raise InputError(f"--batch_size is {options.batch_size}; give at least 1.")

    import torch
    from accelerate import Accelerator
    from accelerate.utils import gather_object
    from tqdm.auto import tqdm

    from eval.encoders import DinoEncoder
    from eval.frechet import Inception, frechet_distance
    from eval.segmentation import agreement, confusion_matrix

    accelerator = Accelerator()
    device = accelerator.device
    toybox = options.protocol == "toybox"
    segmenter_name = options.segmenter or (str(MINI_SEGMENTER) if toybox else ADE20K_SEGMENTER)
    segmenter = Segmenter(segmenter_name, device)
    features = options.frechet_features or ("dino" if toybox else "inception")
    dino_name = options.dino or (f"local-dir:{MINI_DINO}" if toybox else "vit_small_patch16_224.dino")
    encoder: Any = None
    if features == "inception":
        encoder = Inception(options.inception_weights, device)
    elif features == "dino":
        dino = DinoEncoder(dino_name, "straight", device)

        def encode(pictures: Sequence[Image.Image]) -> torch.Tensor:
            views: Any = [dino.transform(picture) for picture in pictures]
            return dino.encode(torch.stack(views)).cpu()

    classes = segmenter.classes
    confusion = {kind: torch.zeros(classes, classes, dtype=torch.long) for kind in ("generated", "real")}
    rows: list[tuple[int, float]] = []
    vectors: dict[str, list[tuple[int, torch.Tensor]]] = {"generated": [], "real": []}
    mine = range(accelerator.process_index, len(drawn), accelerator.num_processes)
    chunks = [mine[i : i + options.batch_size] for i in range(0, len(mine), options.batch_size)]
    for chunk in tqdm(chunks, desc="segmenting", disable=not accelerator.is_local_main_process):
        pictures = {"generated": [load_rgb(drawn[i][0]) for i in chunk], "real": []}
        sides = {picture.size for picture in pictures["generated"]}
        if len(sides) > 1 or any(width != height for width, height in sides):
            raise InputError(f"the pictures of {options.generated_dir} are not squares of one size; generate them so.")
        truths = []
        for i, picture in zip(chunk, pictures["generated"]):
            truth, real = truth_of.of(drawn[i][1], picture.width)
            greatest = int(truth[truth != IGNORED].max(initial=0))
            if greatest >= classes:
                raise InputError(
                    f"the map of {drawn[i][1].name} holds class {greatest}, but {segmenter_name} knows {classes}; "
                    "give a --label_map, or the --ignore_index."
                )
            truths.append(truth)
            if real is not None:
                pictures["real"].append(real)
        for kind, some in pictures.items():
            if len(some) == len(chunk):
                found = segmenter(some)
                for i, truth, labels in zip(chunk, truths, found):
                    one = confusion_matrix(torch.from_numpy(truth), torch.from_numpy(labels), classes, IGNORED)
                    confusion[kind] += one
                    if kind == "generated":
                        rows.append((i, float(one.diagonal().sum() / one.sum().clamp(min=1))))
                if features != "none":
                    encoded = encoder.encode(some) if encoder is not None else encode(some)
                    vectors[kind] += list(zip(chunk, encoded))
    # Every picture was counted on one process; whole numbers are added up, so the sum is exact.
    confusion = {k: accelerator.reduce(c.to(device), "sum").cpu() for k, c in confusion.items()}  # pyright: ignore
    rows = sorted(gather_object(rows))
    vectors = {kind: sorted(gather_object(some), key=lambda pair: pair[0]) for kind, some in vectors.items()}
    if not accelerator.is_main_process:
        return None

    result = {kind: agreement(matrix) for kind, matrix in confusion.items() if matrix.sum() > 0}
    frechet = None
    if features != "none" and vectors["real"]:
        stacked = {kind: torch.stack([vector for _, vector in some]) for kind, some in vectors.items()}
        frechet = frechet_distance(stacked["real"], stacked["generated"])
    named = {"inception": "FID", "dino": f"Frechet distance on {dino_name}", "none": None}[features]

    def summary(kind: str) -> dict[str, float]:
        values = result[kind]
        return {
            "miou": values.miou,
            "mean_accuracy": values.mean_accuracy,
            "pixel_accuracy": values.pixel_accuracy,
        }

    per_class = [
        {
            "class": index,
            "name": segmenter.labels.get(index, str(index)),
            "pixels": int(confusion["generated"][index].sum()),
            **{f"{kind}_iou": _number(values.iou[index]) for kind, values in result.items()},
            **{f"{kind}_accuracy": _number(values.recall[index]) for kind, values in result.items()},
        }
        for index in range(classes)
    ]
    order = sorted(rows, key=lambda row: row[1])
    scored = {
        "protocol": options.protocol,
        "scores": summary("generated") | {"frechet": frechet},
        "real": summary("real") if "real" in result else None,
        "frechet": {"name": named, "features": features, "pictures": len(vectors["generated"])},
        "segmenter": segmenter_name,
        "label_map": truth_of.names,
        "ignore_index": options.ignore_index,
        "counts": {"pictures": len(drawn), "pixels": int(confusion["generated"].sum())},
        "classes": per_class,
        "pictures": [
            {"file_name": drawn[i][0].name, "map": drawn[i][1].name, "pixel_accuracy": round(value, 6)}
            for i, value in rows
        ],
    }
    return scored, [(f"{value:.0%} of the pixels", *drawn[i]) for i, value in order], segmenter


def _number(value: Any) -> float | None:
    number = float(value)
    return None if number != number else number


def write_sheet(file: Path, ranked: Ranked, segmenter: Segmenter, truth_of: Truth, each: int = 6) -> None:
    """The best and the worst pictures: map, picture, what the segmenter saw, the real picture."""
    from matplotlib.figure import Figure

    colours = np.zeros((256, 3), np.uint8)
    colours[:IGNORED] = generated(IGNORED)
    each = min(each, (len(ranked) + 1) // 2)
    shown = [("best", row) for row in ranked[::-1][:each]] + [("worst", row) for row in ranked[:each]]
    figure = Figure(figsize=(8.8, 2.35 * len(shown)), dpi=80, layout="constrained")
    axes = figure.subplots(len(shown), 4, squeeze=False)
    for row, (kind, (label, path, pair)) in zip(axes, shown):
        picture = load_rgb(path)
        truth, real = truth_of.of(pair, picture.width)
        titles = ("map", f"{kind}: {label}", "as segmented", "real")
        for axis, title, image in zip(row, titles, (colours[truth], picture, colours[segmenter([picture])[0]], real)):
            axis.axis("off")
            axis.set_title(title, fontsize=9)
            if image is not None:
                axis.imshow(image)
    figure.savefig(file, format="png")


def table(result: dict[str, Any]) -> str:
    """The scores as a few lines to read in a terminal."""
    lines = [f"{'':14}{'mIoU':>8}{'mAcc':>8}{'aAcc':>8}{'Frechet':>10}"]
    for label, row in (("generated", result["scores"]), ("real pictures", result["real"])):
        if row is not None:
            cells = "".join(f"{row[name]:8.3f}" for name in ("miou", "mean_accuracy", "pixel_accuracy"))
            distance = row.get("frechet")
            lines.append(f"{label:14}{cells}" + ("" if distance is None else f"{distance:10.3f}"))
    lines.append(f"{result['counts']['pictures']} pictures; {result['segmenter']}; {result['frechet']['name']}")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> None:
    sheet = options.output.with_suffix(".png")
    for file in (options.output, sheet):
        if file.exists():
            raise InputError(f"{file} exists already; remove it or name another --output.")
    scored = score(options)
    if scored is None:
        return
    result, ranked, segmenter = scored
    with written_whole(sheet) as temporary:
        write_sheet(temporary, ranked, segmenter, Truth(options))
    write_text(options.output, json.dumps(result, indent=2) + "\n")
    print(table(result))
    print(f"wrote {options.output} and {sheet}")
