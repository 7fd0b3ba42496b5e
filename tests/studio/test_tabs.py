"""What the tabs show of folders that people made by hand, copied from elsewhere, or that were damaged."""

import json

import pytest

from delora_diffusers.errors import InputError
from delora_diffusers.names import CONFIG_NAME, METADATA_NAME, WEIGHTS_NAME
from studio import adapters, comparison, runs
from studio.workspace import Workspace

pytest.importorskip("gradio", reason="the extra studio is not installed")
from studio.scorer import Scorer
from studio.tabs import compare, export, run_view, train

HTML = "<img src=x onerror=alert(1)>"
SETTINGS = {
    "numbers": dict.fromkeys(("instance_prompt", "instance_data_dir", "validation_prompt", "seed", "resolution"), 3),
    "lists": {key: [HTML] for key in ("instance_prompt", "instance_data_dir", "pretrained_model_name_or_path")},
    "outside": {"instance_data_dir": "/etc", "pretrained_model_name_or_path": "mini-sd", "max_train_steps": HTML},
}
CONTENTS = {
    **{"empty": b"", "cut": b"{", "list": b"[]", "number": b"3", "null": b"null", "not-utf8": b"\xff\xfe"},
    **{"deep": b"[" * 100_000, "html": HTML.encode(), "no-arguments": b'{"arguments": 3, "command": [1]}'},
    **{name: json.dumps({"arguments": settings}).encode() for name, settings in SETTINGS.items()},
}
OF_RUN = (
    *(CONFIG_NAME, WEIGHTS_NAME, "README.md", "validation/step-000003.png", "logs/a/events.out.tfevents.1"),
    *(f"checkpoint-3/{WEIGHTS_NAME}", "checkpoint-3/sizes.json", f"best/{WEIGHTS_NAME}", "checkpoint-x/sizes.json"),
)
OF_STUDIO = ("run.json", "scores.json", "log.txt", "samples/step-000003/samples.json")


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return Workspace(tmp_path / "ws")


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_damaged_files_are_shown_as_sentences(workspace, content):
    run, output = workspace.run("mine"), workspace.output("mine")
    for folder, names in (
        (run, OF_RUN),
        (workspace.runs / ".studio" / "mine", OF_STUDIO),
        (output, (*comparison.BENCHMARK_FILES, METADATA_NAME)),
    ):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    scorer = Scorer(workspace)
    shown = [str(part) for part in run_view.looked(workspace, scorer, "mine", False, None)]
    scorer.close()
    assert shown[0] and not any("<img src=x" in part for part in shown)
    assert [state.name for state in runs.states(workspace)] == ["mine"]
    assert adapters.adapters(workspace) == ["mine", "mine/best", "mine/checkpoint-3"]
    assert comparison.benchmarks(workspace) == ["mine"] and adapters.on_miniature(run) in (True, False)
    assert comparison.default_prompts(workspace, "mine").count("\n") == 3
    with pytest.raises(InputError):
        runs.resume(workspace, "mine")
    for words in (
        lambda: adapters.generate_words(workspace, [("mine", 0.5)], ["a"], ["1"], {}),
        lambda: comparison.report_words(workspace, ["mine"]),
        lambda: export.export_words(workspace, [("mine", 1.0)], "peft", "fp32", "", ""),
    ):
        assert words()[0][0] in ("python", "--adapter")


def test_links_in_a_run_show_nothing_of_what_they_lead_to(workspace, tmp_path):
    (tmp_path / "secret.txt").write_text("error: secret\n")
    run = workspace.run("mine")
    (run / "validation").mkdir(parents=True)
    (run / WEIGHTS_NAME).write_bytes(b"")
    studio = workspace.runs / ".studio" / "mine"
    studio.mkdir(parents=True)
    record = {"values": {}, "command": ["a"], "token": "b", "started": 1.0, "first_step": 0, "steps": 9, "log_start": 0}
    (studio / "run.json").write_text(json.dumps(record))
    for link in (studio / "log.txt", run / "README.md", run / "validation" / "step-000001.png"):
        link.symlink_to(tmp_path / "secret.txt")
    (run / WEIGHTS_NAME).unlink()  # or it is finished, which needs no log
    shown = run_view.looked(workspace, Scorer(workspace), "mine", False, None)
    assert "ended without a message" in shown[0] and "secret" not in str(shown)
    with pytest.raises(InputError, match="outside the workspace"):
        export.card_of(workspace, run)


def test_results_are_shown_with_the_real_images(workspace):
    scores = {"dino": 0.5, "clip_i": 0.6, "clip_t": 0.7}
    result = {"scores": scores, "real": {"dino": 0.9, "clip_i": 0.8}, "protocol": "toybox"}
    result |= {"counts": {"generated": 4, "reference": 5}}
    html = compare.results_of({"base model": result, HTML: result}, [])
    assert "<img" not in html and "real images 0.9" in html and "stroke" not in html
    assert html.count('class="axis dashed"') == 1 and "<td>-</td>" in html


def test_defaults_are_shown_where_they_are_known():
    fields = {field.name: field for field in train.flags.fields()}
    assert train.hint_of(fields["method"], "delora")["choices"][0] == ("delora (default)", "")
    assert train.hint_of(fields["recipe"], "default")["choices"][0] == ("default", "")
    assert train.hint_of(fields["resolution"], [512])["placeholder"] == "default: 512"
    assert train.hint_of(fields["rank"], None)["placeholder"] == "default"
