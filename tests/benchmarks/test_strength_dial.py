"""Settings compared at equal prompt fidelity: the curve of the strength, a scheduled boundary, and what is tried."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from benchmarks import beyond_lora, miniature_runs, miniature_subjects, strength_dial, time_to_quality
from benchmarks.beyond_lora import BASE, report, slug
from benchmarks.beyond_lora_tries import FINALISTS, REFERENCE, TRIES
from benchmarks.strength_dial import CLIP_T_LOSS, Toys, at_equal_clip_t
from delora_diffusers.errors import InputError
from tests.helpers import run_in_child
from train_dreambooth_delora import parse_arguments


def test_the_training_script_has_the_flags_of_every_try():
    assert len({slug(name) for name in [BASE, *TRIES]}) == len(TRIES) + 1 and set(FINALISTS) <= set(TRIES)
    seen = []
    for name, tried in TRIES.items():
        flags = {name: value for name, value in tried.flags().items() if value is not False}
        args = parse_arguments(["--output_dir", "out", *miniature_runs.flags(flags)])
        assert args.method == tried.method and (args.relative_bound is None) == (tried.method != "delora")
        kept = {key: value for key, value in vars(args).items() if key != "instance_data_dir"} | {"b": tried.boundary}
        assert kept not in seen, f"{name} is the same as an earlier try"
        seen.append(kept)


def rows(name: str, points: list[tuple[float, float, float]], subjects: int = 3) -> pd.DataFrame:
    """Rows of (strength, DINO, CLIP-T); toy k has k / 10 more DINO."""
    return pd.DataFrame(
        [
            {"name": name, "seed": 0, "subject": k, "strength": s, "dino": d + k / 10, "clip_t": c}
            for s, d, c in points
            for k in range(subjects)
        ]
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 0.8), st.floats(0.6, 0.75)), min_size=1, max_size=4))
def test_equal_clip_t_is_interpolated_between_the_base_model_and_the_strengths(points):
    base = rows("base", [(0.0, 0.05, 0.72)])
    tried = rows("try", [(k + 1.0, d, c) for k, (d, c) in enumerate(points)])
    value = at_equal_clip_t(tried, base)[0]
    at, candidates = 0.72 - CLIP_T_LOSS, [(0.72, 0.05), *((c, d) for d, c in points)]
    enough = [d for c, d in candidates if c >= at]
    crossed = [d0 + (d1 - d0) * (at - c0) / (c1 - c0) for c0, d0 in candidates for c1, d1 in candidates if c0 < at < c1]
    assert max(enough) + 0.1 - 1e-6 <= value <= max([*enough, *crossed]) + 0.1 + 1e-6


def test_the_table_ranks_tries_by_what_they_keep():
    base = rows(slug(BASE), [(0.0, 0.1, 0.72)])
    better, worse = rows(slug("900 steps"), [(1.0, 0.5, 0.71)]), rows(slug(REFERENCE), [(1.0, 0.6, 0.70)])
    names = {slug(REFERENCE): REFERENCE, slug("900 steps"): "900 steps"}
    lines = report(pd.concat([base, better, worse]), names).splitlines()
    assert lines[2] == "| 900 steps | 0.600 | +0.150 [+0.150, +0.150] | 0.600 | 0.710 |"
    other = report(pd.concat([base, better, worse]), names, "900 steps").splitlines()
    assert other[0].count("minus 900 steps") == 1 and "| -0.150 [-0.150, -0.150] |" in other[3]
    assert lines[3] == f"| {REFERENCE} | 0.450 |  | 0.700 | 0.700 |"
    assert "3 toys, 1 seed. " in lines[-1]


def test_the_table_of_earlier_rows(tmp_path, capsys):
    base, tried = rows(slug(BASE), [(0.0, 0.1, 0.72)]), rows(slug("900 steps"), [(1.0, 0.5, 0.71)])
    file = tmp_path / "rows.parquet"
    pd.concat([base, tried]).to_parquet(file)
    beyond_lora.main([str(tmp_path / "out"), "--from_rows", str(file)])
    table = (tmp_path / "out/table.md").read_text()
    assert (
        "| 900 steps | 0.600 | 0.600 | 0.710 |" in table
        and "minus" not in table
        and table in capsys.readouterr().out + "\n"
    )
    with pytest.raises(InputError, match="the rows have no 'LoRA'; they have 900-steps, base-model"):
        beyond_lora.main([str(tmp_path / "out"), "--from_rows", str(file), "--tries", "LoRA"])
    with pytest.raises(InputError, match="the rows have no 'LoRA'"):
        beyond_lora.main([str(tmp_path / "new"), "--from_rows", str(file), "--reference", "LoRA"])
    with pytest.raises(InputError, match="--seeds belongs to training; leave it out with --from_rows"):
        beyond_lora.main([str(tmp_path / "new"), "--from_rows", str(file), "--seeds", "3"])
    assert not (tmp_path / "new").exists()
    pd.concat([base, tried, rows(slug("LoRA"), [(1.0, 0.4, 0.71)])]).to_parquet(file)
    beyond_lora.main([str(tmp_path / "out"), "--from_rows", str(file), "--tries", "LoRA", "--reference", "900 steps"])
    assert "| LoRA | 0.500 | -0.100 [-0.100, -0.100] | 0.500 | 0.710 |" in (tmp_path / "out/table.md").read_text()
    tried.to_parquet(file)
    with pytest.raises(InputError, match="the rows have no 'base model'"):
        beyond_lora.main([str(tmp_path / "out"), "--from_rows", str(file)])


@pytest.mark.parametrize("module", [beyond_lora, miniature_subjects, time_to_quality])
def test_bad_input_is_refused_before_anything_is_rendered(module, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is a file; choose another folder"):
        module.main([str(tmp_path / "file")])
    with pytest.raises(SystemExit):
        module.main([str(tmp_path / "out"), "--subjects", "-1"])
    assert "-1 is negative; toys have numbers from 0 on" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def _train_with_a_growing_boundary(folder) -> None:
    miniature_runs.GENERATION |= {"num_inference_steps": 1, "resolution": 64}
    strength_dial.PLACES, strength_dial.LOOKS = ("at night",), ()
    strength_dial.write_photos(folder / "photos", (220, 221))
    train = beyond_lora.TRIES["B = 0, boundary grows"].flags() | {"max_train_steps": 3, "resolution": 64, "rank": 2}
    names = {"half": ((0, 0.01), (1, 0.5)), "whole": ((0, 0.01), (0.6, 1), (1, 1))}
    for name, boundary in names.items():
        run = Toys(folder / f"{name}-seed-0", folder / "photos", (220, 221), 0, train, boundary, strengths=(1.0,))
        result = strength_dial.run_toys(run)
        (folder / f"{name}.json").write_text(json.dumps(result["rows"]))


@pytest.mark.integration
def test_a_boundary_follows_its_schedule(tmp_path):
    run_in_child(_train_with_a_growing_boundary, tmp_path)
    ends = {}
    for name in ("half", "whole"):
        weights = load_file(tmp_path / f"{name}-seed-0" / "adapters" / "221" / "pytorch_delora_weights.safetensors")
        ends[name] = np.array([float(weights[key]) for key in sorted(weights) if key.endswith("lambda")])
        assert len(json.loads((tmp_path / f"{name}.json").read_text())) == 2
    expected = 0.2 * np.sqrt([128, 160])
    assert np.isclose(ends["whole"][:, None], expected, rtol=1e-4).any(axis=1).all()
    np.testing.assert_allclose(ends["half"], 0.5 * ends["whole"], rtol=1e-4)
