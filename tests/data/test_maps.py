"""Pairs of images and maps: every layout, every error, and alignment under augmentation."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.maps import MapPair, check_pairs, find_hub_pairs, find_pairs, pair_views
from data.palettes import generated_palette, indices_of, read_palette
from delora_diffusers.errors import InputError
from delora_diffusers.maps import find_maps
from tests.helpers import PALETTE, painted_map, write_map_folders


@settings(max_examples=60, deadline=None)
@given(
    st.integers(12, 90),
    st.integers(12, 90),
    st.sampled_from([8, 16, 40]),
    st.lists(st.floats(0, 1), min_size=1, max_size=4),
    st.booleans(),
    st.integers(0, 99),
)
def test_augmentation_keeps_image_and_map_aligned(width, height, resolution, offsets, flip, seed):
    """Images are painted in their maps' colours, so every view of an image must show the colours of its map."""
    image, indices = painted_map(seed, (width, height))
    views = pair_views(image, np.asarray(indices), (resolution, resolution), offsets, flip)
    assert len(views) % 2 == 0 if flip else views
    for view, semantic in views:
        assert view.shape == (resolution, resolution, 3) and semantic.shape == (resolution, resolution)
        assert set(np.unique(semantic)) <= set(np.unique(np.asarray(indices)))  # never blended
        mismatch = np.abs(view.astype(int) - PALETTE[semantic].astype(int)).max(axis=-1) > 60
        # Lanczos blurs the edges between blocks; inside the blocks, the colours must be the map's.
        edges = np.ones_like(mismatch)  # a block may end just outside the crop
        edges[4:-4, 4:-4] = False
        for axis in (0, 1):
            for shift in range(-4, 5):
                edges |= np.roll(semantic, shift, axis) != semantic
        assert not (mismatch & ~edges).any()
    if flip:
        half = len(views) // 2
        for (a, b), (c, d) in zip(views[:half], views[half:]):
            assert np.array_equal(a, c[:, ::-1]) and np.array_equal(b, d[:, ::-1])


def test_layouts(tmp_path):
    folders = find_pairs(write_map_folders(tmp_path / "folders"))
    assert [(p.name, p.caption) for p in folders] == [(f"{n}.png", f"scene {n}") for n in "abc"]
    listed = tmp_path / "listed"
    write_map_folders(listed)
    lines = [{"file_name": f"images/{n}.png", "map": f"maps/{n}.png", "text": f"line {n}"} for n in "cab"]
    (listed / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [p.caption for p in find_pairs(listed)] == ["line c", "line a", "line b"]
    oft = tmp_path / "train"
    (oft / "segm").mkdir(parents=True)
    (oft / "color").mkdir()
    image, indices = painted_map(0)
    image.save(oft / "color" / "1.png")
    Image.fromarray(PALETTE[np.asarray(indices)]).save(oft / "segm" / "1.png")
    record = {"source": "source/1.png", "target": "target/1.png", "prompt": "a room"}
    (oft / "prompt_train_blip.json").write_text(json.dumps(record) + "\n")
    (pair,) = find_pairs(oft)
    assert pair.caption == "a room" and pair.load_map().shape == (30, 40, 3)
    check_pairs([pair], PALETTE)
    assert np.array_equal(indices_of(pair.load_map(), PALETTE, "it"), np.asarray(indices))
    for pairs in (folders, find_pairs(listed)):
        check_pairs(pairs, PALETTE)
        assert np.array_equal(PALETTE[pairs[0].load_map()], np.asarray(pairs[0].load_image()))


def test_the_complete_list_of_an_ade20k_split_is_used(tmp_path):
    """OFT's release has two lists of the validation split: the first by name is an excerpt for its logs."""
    val = tmp_path / "val"
    for part in ("segm", "color"):
        (val / part).mkdir(parents=True)
    lines = []
    for number in range(4):
        image, indices = painted_map(number)
        image.save(val / "color" / f"{number}.png")
        Image.fromarray(PALETTE[np.asarray(indices)]).save(val / "segm" / f"{number}.png")
        record = {"source": f"source/{number}.png", "target": f"target/{number}.png", "prompt": f"room {number}"}
        lines.append(json.dumps(record))
    (val / "prompt_val_blip.json").write_text("\n".join(lines[:2]))
    assert [pair.caption for pair in find_pairs(val)] == ["room 0", "room 1"]
    assert [semantic.caption for semantic in find_maps(val, None)] == ["room 0", "room 1"]
    (val / "prompt_val_blip_full.json").write_text("\n".join(lines[:3]))
    assert [pair.caption for pair in find_pairs(val)] == ["room 0", "room 1", "room 2"]
    assert [(m.key, m.caption) for m in find_maps(val, None)] == [(str(n), f"room {n}") for n in range(3)]


@pytest.mark.parametrize(("method", "rate"), [("delora", 2e-2), ("lora", 6e-4), ("etherplus", 1e-3), ("oft", 1e-5)])
def test_defaults_for_maps(method, rate):
    """OFT's control code and ETHER, appendix C.2."""
    from train_controlnet_map2img import parse_arguments

    args = parse_arguments(["--method", method])
    assert args.learning_rate == rate and args.control_learning_rate == 1e-4
    assert args.targets == ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj"]


def test_dataset_with_columns(tmp_path):
    import datasets

    rows = [painted_map(seed) for seed in range(3)]
    columns = {"photo": [r[0] for r in rows], "labels": [r[1] for r in rows], "text": ["x", "y", "z"]}
    features = {"photo": datasets.Image(), "labels": datasets.Image(), "text": datasets.Value("string")}
    dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    (tmp_path / "d").mkdir()
    dataset.to_parquet(tmp_path / "d" / "train.parquet")
    pairs = find_hub_pairs(str(tmp_path / "d"), None, "train", ("photo", "labels", "text"))
    check_pairs(pairs, PALETTE)
    assert [p.caption for p in pairs] == ["x", "y", "z"]
    assert np.array_equal(pairs[1].load_map(), np.asarray(rows[1][1]))
    with pytest.raises(InputError, match="--map_column map is not a column of .*; it has photo, labels, text"):
        find_hub_pairs(str(tmp_path / "d"), None, "train", ("photo", "map", None))
    with pytest.raises(InputError, match="--dataset_name .*nowhere could not be loaded"):
        find_hub_pairs(str(tmp_path / "nowhere"), None, "train", ("a", "b", None))


def assert_rejected(message: str, folder, palette: np.ndarray | None = PALETTE, **options):
    with pytest.raises(InputError, match=message):
        check_pairs(find_pairs(folder), palette, **options)


def test_errors(tmp_path):
    folder = write_map_folders(tmp_path / "x", [f"p{i}" for i in range(6)])
    for name in ("p1", "p2", "p3", "p4"):
        (folder / "images" / f"{name}.txt").unlink()
    assert_rejected("4 images have no caption: p1.png, p2.png, p3.png and 1 more; add captions", folder)
    check_pairs(find_pairs(folder), PALETTE, need_captions=False)
    Image.fromarray(np.full((30, 40), 7, np.uint8)).save(folder / "maps" / "p2.png")
    assert_rejected(
        r"1 maps contain classes outside the palette of 6 colours: p2.png \(7\)", folder, need_captions=False
    )
    Image.fromarray(np.full((30, 40), 300, np.uint16)).save(folder / "maps" / "p2.png")
    assert_rejected("the map of p2.png has class 300", folder, need_captions=False)
    Image.fromarray(np.zeros((15, 20), np.uint8)).save(folder / "maps" / "p2.png")
    assert_rejected("1 maps differ in size from their images: p2.png", folder, need_captions=False)
    Image.fromarray(np.full((30, 40, 3), 9, np.uint8)).save(folder / "maps" / "p2.png")
    assert_rejected(
        r"p2.png has the colour \(9, 9, 9\), which is not in the palette \(100.0% of", folder, need_captions=False
    )
    assert_rejected("1 maps do not contain indices as the others do: p2.png", folder, palette=None, need_captions=False)
    (folder / "maps" / "p2.png").write_text("not an image")
    assert_rejected("p2.png is not a readable image", folder, need_captions=False)
    for name in ("p0", "p1", "p2", "p5"):
        (folder / "maps" / f"{name}.png").unlink()
    assert_rejected(
        "4 images in .*images have no map of the same name in .*maps: p0.png, p1.png, p2.png and 1 more", folder
    )
    assert_rejected("is not a folder", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert_rejected("contains no pairs", tmp_path / "empty")
    (tmp_path / "empty" / "metadata.jsonl").write_text('{"file_name": "a.png", "map": "b.png"}\n')
    assert_rejected("2 files listed in .*metadata.jsonl are missing: a.png, b.png", tmp_path / "empty")
    (tmp_path / "empty" / "metadata.jsonl").write_text("{")
    assert_rejected("line 1 is not a record", tmp_path / "empty")


def test_size_of_a_rotated_photo_matches_its_map(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image, indices = painted_map(0)
    image.rotate(90, expand=True).save(tmp_path / "a.jpg", exif=exif)
    check_pairs([MapPair("a", indices, tmp_path / "a.jpg", "x")], PALETTE)


def test_reduced_labels():
    pair = MapPair("a", Image.fromarray(np.array([[0, 1, 150, 255]], np.uint8)), None, None)
    assert pair.load_map(reduce_labels=True).tolist() == [[255, 0, 149, 255]]


def test_palettes(tmp_path):
    colours = generated_palette(60)
    assert np.array_equal(generated_palette(20), colours[:20])
    gaps = np.abs(colours[:20, None].astype(int) - colours[None, :20]).sum(-1) + 999 * np.eye(20, dtype=int)
    assert gaps.min() > 90 and (colours.sum(1) > 60).all()
    ade = read_palette("ade20k")
    assert ade.shape == (150, 3) and ade[2].tolist() == [6, 230, 230] and ade[149].tolist() == [92, 0, 255]
    for text in ("255 0 0 wall\n0, 0, 255\n", "#ff0000 wall\n#0000ff\n", "[[255, 0, 0], [0, 0, 255]]"):
        (tmp_path / "p").write_text(text)
        assert read_palette(str(tmp_path / "p")).tolist() == [[255, 0, 0], [0, 0, 255]]
    for text, message in (
        ("red\n", "the line 'red'"),
        ("[[1, 2]]", "numbers"),
        ("300 0 0", "a channel of 300"),
        ("", ""),
    ):
        (tmp_path / "p").write_text(text)
        with pytest.raises(InputError, match=f"is not a palette .*{message}"):
            read_palette(str(tmp_path / "p"))
    with pytest.raises(InputError, match="is not a file; give a palette file, ade20k or generated"):
        read_palette("rainbow")


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_maps_of_few_bits_hold_their_classes(tmp_path, bits):
    """Pillow spreads them over 0 to 255."""
    import struct
    import zlib

    from delora_diffusers.maps import read_map

    values = np.arange(8, dtype=np.uint8) % 2**bits
    packed = np.packbits(np.unpackbits(values[:, None], axis=1)[:, -bits:])
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 8, 1, bits, 0, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(b"\0" + packed.tobytes())), (b"IEND", b"")]
    png = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    (tmp_path / "map.png").write_bytes(b"\x89PNG\r\n\x1a\n" + png)
    assert read_map(tmp_path / "map.png", "x").tolist() == [values.tolist()]


def test_maps_that_cannot_hold_classes_are_refused(tmp_path):
    from delora_diffusers.maps import read_map

    Image.fromarray(np.full((8, 8), 3, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(InputError, match="has floating-point or 16-bit colours"):
        read_map(tmp_path / "float.tif", "x")
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    Image.merge("LA", [grey, Image.new("L", (8, 8), 255)]).save(tmp_path / "la.png")
    assert np.array_equal(read_map(tmp_path / "la.png", "x"), np.asarray(grey))


def test_lossy_maps_and_repeated_lines_are_refused(tmp_path):
    import json

    write_map_folders(tmp_path / "named")
    (tmp_path / "named" / "maps" / "a.png").unlink()
    Image.new("L", (40, 30)).save(tmp_path / "named" / "maps" / "a.jpg")
    with pytest.raises(InputError, match=r"images in .* have no map of the same name in .*: a\.png"):
        find_pairs(tmp_path / "named")
    write_map_folders(tmp_path / "listed")
    line = {"file_name": "images/a.png", "map": "maps/a.png", "text": "x"}
    (tmp_path / "listed" / "metadata.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps(line)}\n")
    with pytest.raises(InputError, match=r"listed more than once in .*metadata\.jsonl: images/a\.png"):
        find_pairs(tmp_path / "listed")


@pytest.mark.parametrize("text", ["[[1.5, 2, 3]]", "[[true, 1, 2]]", '[["1", "2", "3"]]', "0 255 0 0\n", "[[1, 2]]"])
def test_palettes_of_other_numbers_are_refused(tmp_path, text):
    from data.palettes import read_palette

    (tmp_path / "palette").write_text(text)
    with pytest.raises(InputError, match="is not a palette"):
        read_palette(str(tmp_path / "palette"))
