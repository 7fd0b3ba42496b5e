"""What is lost when commands are killed, write to one folder at the same time, or fill up the disk.

    python benchmarks/reliability.py --output_dir runs/reliability [--kills 20] [--pairs 6] [--disks 4]

Every trial runs the real commands in new processes, on a tiny random pipeline and synthetic photos, on the CPU, and
compares the results byte by byte with those of the same command when nothing disturbs it.

- kills: a command is killed with SIGKILL and repeated, up to three times, and then must end with the same results. Half
  of the moments are spread over the time of an undisturbed run, half over the part of it in which files are written.
- pairs: two commands start at the same time, or up to a second apart, with the same output folder. The result must be
  that of one of them alone; the other must be refused, or may find everything finished if it is the same command.
- disks: the disk of the output folder fills up. The command must stop with a one-line error and leave no part of a
  file, and must end with the same results when it is repeated after space is freed. This mounts a tmpfs, which needs
  root; without it these rows say "not run".

The table is also written to reliability.md in the output folder. If anything fell short, the details follow the table,
the folders of those trials are kept (except on mounted disks), and the exit code is 1.
"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from delora_diffusers.dispatch import exit_on_bad_input
from delora_diffusers.outputs import MIN_FREE_BYTES

ROOT = Path(__file__).resolve().parent.parent
TRAIN = """train_dreambooth_delora.py --pretrained_model_name_or_path {top}/model --instance_data_dir {top}/photos
    --instance_prompt "a photo of sks toy" --resolution 64 --rank 2 --max_train_steps 40 --logging_steps 1
    --checkpointing_steps 2 --checkpoints_total_limit 3 --validation_prompt "a sks toy" --validation_steps 5
    --num_validation_images 1 --validation_inference_steps 2 --with_prior_preservation --class_prompt "a toy"
    --num_class_images 4 --sample_batch_size 2 --output_dir {folder}/out"""
GENERATE = """-m delora_diffusers generate --pretrained_model_name_or_path {top}/model --num_inference_steps 4
    --prompt "a sks toy" "a sks toy in the snow" --batch_size 2 --output_dir {folder}/out"""
ADAPTER = "--adapter {top}/undisturbed/training/out"
EXPORT = f"-m delora_diffusers export {ADAPTER} --output {{folder}}/out --format"
COMMANDS = {
    "training": f"{TRAIN} --seed 0",
    "training with another seed": f"{TRAIN} --seed 1",
    "generate": f"{GENERATE} {ADAPTER} --guidance_scale 5",
    "generate with another guidance scale": f"{GENERATE} {ADAPTER} --guidance_scale 9",
    "generate without adapter": GENERATE,
    "merge": f"-m delora_diffusers merge {ADAPTER} --output_dir {{folder}}/out",
    "export to diffusers": f"{EXPORT} diffusers",
    "export to peft": f"{EXPORT} peft",
    "export to peft-delora": f"{EXPORT} peft-delora",
    "import": """-m delora_diffusers import --peft_dir "{top}/undisturbed/export to peft-delora/out"
        --pretrained_model_name_or_path {top}/model --output_dir {folder}/out""",
    "eval page": """-m eval page --protocol toybox --generated_dir {top}/undisturbed/generate/out --reference_dir
        {top}/photos --base_dir "{top}/undisturbed/generate without adapter/out" --output {folder}/page.html""",
}
"""Arguments of python by name; ``{folder}`` is that of the trial. A command reads only the output of earlier ones."""
KILLED = ("training", "generate", "merge", "export to diffusers", "export to peft", "import")
RESUMED, REPEATED = "two trainings that resume one run", "two generate with the same settings"
PAIRS = {
    "two trainings with different seeds": ("training", "training with another seed"),
    RESUMED: ("training", "training"),
    "two generate with different settings": ("generate", "generate with another guidance scale"),
    REPEATED: ("generate", "generate"),
}
FILLED = ("training", "generate", "eval page")
NOT_COMPARED = re.compile(r"^out/(checkpoint-|logs/|config\.json$|README\.md$)|\.part(/|$)")
"""Files of a training run that contain its command or the time; and temporary files, which are counted separately."""
FINISHED = "already exists; remove it"
"""What a repeated command says if it was killed after its output was complete."""
KILL = -signal.SIGKILL


@dataclasses.dataclass(frozen=True)
class Ended:
    """A command that has ended, its output, its seconds, and those from the first write of a file to the last."""

    command: list[str]
    code: int
    lines: list[str]
    seconds: float = 0
    writing: float = 0

    def refuses(self, folder: Path) -> bool:
        """Whether it failed with a one-line error that names the folder."""
        plain = self.lines[-1].startswith("error: ") and not any("Traceback" in line for line in self.lines)
        return self.code == 1 and plain and str(folder) in self.lines[-1]


@dataclasses.dataclass
class Outcome:
    """One row of the table: of the trials that fell short, how many, their problems by kind, and the details."""

    tried: str
    count: str = "not run"
    shortfalls: int = 0
    kinds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    details: list[str] = dataclasses.field(default_factory=list)

    def add(self, folder: Path, problems: list[str], runs: list[Ended]) -> None:
        """Record a trial with its problems ("kind: details"), and remove its folder if there are none."""
        print(f"{folder.name}: {'; '.join(problems) or 'as expected'}", file=sys.stderr, flush=True)
        if not problems:
            shutil.rmtree(folder, ignore_errors=True)
            return
        self.shortfalls += 1
        self.kinds.update(problem.split(":")[0] for problem in problems)
        self.details.append(f"{folder.name}: {'; '.join(problems)}")
        for ended in runs:
            self.details.append(f"  exit code {ended.code}: {shlex.join(ended.command)}")
            self.details += [f"    {line[:400]}" for line in ended.lines[-4:]]

    def row(self) -> str:
        kinds = ", ".join(f"{kind}: {number}" for kind, number in self.kinds.items())
        short = "-" if self.count == "not run" else f"{self.shortfalls}{kinds and f' ({kinds})'}"
        return f"| {self.tried} | {self.count} | {short} |"


def arguments(name: str, top: Path, folder: Path, again: bool = False) -> list[str]:
    """The command of this name, whose output is for a folder; ``again`` if it continues there."""
    words = [word.format(top=top, folder=folder) for word in shlex.split(COMMANDS[name])]
    resume = ["--resume_from_checkpoint", "latest"] if again and name.startswith("training") else []
    return [sys.executable, *words, *resume]


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stream:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[bytes], command: list[str], log: Path, *times: float) -> Ended:
    code = process.wait()
    lines = [line for line in re.split(r"[\r\n]+", log.read_text(errors="replace")) if line.strip()]
    return Ended(command, code, lines or [""], *times)


def run(command: list[str], folder: Path, kill_after: tuple[str, float] | None = None) -> Ended:
    """Run a command that writes to a folder; kill it this many seconds after its "start" or its first "write"."""
    log = folder.with_name(f"{folder.name}.log")
    seen, began = files(folder), time.perf_counter()
    first = last = None
    process = start(command, log)
    while process.poll() is None:
        now = time.perf_counter()
        if new := files(folder) - seen:
            seen, first, last = seen | new, first or now, now
        since = began if kill_after and kill_after[0] == "start" else first
        if kill_after and since and now - since >= kill_after[1]:
            process.kill()
        time.sleep(0.002)
    return finish(process, command, log, time.perf_counter() - began, (last or began) - (first or began))


def files(folder: Path) -> set[tuple[str, int]]:
    """The files in a folder and when they were last written. A file may vanish while this looks."""
    written = set()
    for parent, _, names in os.walk(folder):
        for path in (os.path.join(parent, name) for name in names):
            with contextlib.suppress(FileNotFoundError):
                written.add((path, os.stat(path).st_mtime_ns))
    return written


def contents(folder: Path) -> dict[str, str]:
    """A digest of each result in a folder, by name."""
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in names.items() if not NOT_COMPARED.search(n)}


def compare(folder: Path, top: Path, name: str) -> list[str]:
    """How the results in a folder differ from those of the undisturbed command, and temporary files left in it."""
    results, expected = contents(folder), contents(top / "undisturbed" / name)
    kinds = {
        "missing": expected.keys() - results.keys(),
        "unexpected": results.keys() - expected.keys(),
        "different": {file for file in expected.keys() & results.keys() if expected[file] != results[file]},
        "left behind": {path.name for path in folder.rglob("*.part")},
    }
    return [f"{kind}: {', '.join(sorted(names))}" for kind, names in kinds.items() if names]


def prepare(top: Path) -> dict[str, Ended]:
    """Write the photos and the pipeline, and run every command once; returns how they ended, by name."""
    (top / "photos").mkdir(parents=True)
    for number in range(3):
        coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((96, 96), Image.Resampling.BICUBIC)
        image.save(top / "photos" / f"{number}.png")
    subprocess.run([sys.executable, "-m", "data.tiny_sd", str(top / "model")], cwd=ROOT, check=True)
    undisturbed = {}
    for name in COMMANDS:
        folder = top / "undisturbed" / name
        undisturbed[name] = ended = run(arguments(name, top, folder), folder)
        if ended.code:
            raise SystemExit(f"error: {shlex.join(ended.command)} failed:\n" + "\n".join(ended.lines[-20:]))
    return undisturbed


def kill_times(count: int, undisturbed: Ended, chance: random.Random) -> list[tuple[str, float]]:
    """Moments to kill a command, each in another part of its whole time or of the time in which it writes."""
    spans = {"start": undisturbed.seconds, "write": undisturbed.writing}
    counts = {"start": count - count // 2, "write": count // 2}
    times = [(o, (k + chance.random()) / n * spans[o]) for o, n in counts.items() for k in range(n)]
    chance.shuffle(times)
    return times


def try_kills(top: Path, name: str, count: int, undisturbed: Ended, chance: random.Random) -> Outcome:
    outcome = Outcome(f"{name}, killed and repeated")
    times, kills, trials = kill_times(count, undisturbed, chance), 0, 0
    while times:
        folder, runs = top / "trials" / f"kill {name} {trials}", []
        for _ in range(chance.randint(1, 3)):
            if times and (not runs or runs[-1].code == KILL):
                runs.append(run(arguments(name, top, folder, again=bool(runs)), folder, times.pop()))
        if runs[-1].code == KILL:
            runs.append(run(arguments(name, top, folder, again=True), folder))
        problems = compare(folder, top, name)
        if runs[-1].code and (problems or FINISHED not in runs[-1].lines[-1]):
            problems.insert(0, f"not continued: {runs[-1].lines[-1]}")
        outcome.add(folder, problems, runs)
        kills, trials = kills + sum(ended.code == KILL for ended in runs), trials + 1
    outcome.count = f"{kills} kills of {trials} runs"
    return outcome


def try_pairs(top: Path, title: str, count: int, chance: random.Random, stopped: Path) -> Outcome:
    """Run two commands at once; those that resume continue a copy of the folder ``stopped``."""
    names, resumed = PAIRS[title], title == RESUMED
    outcome = Outcome(f"{title}, at once in one folder", f"{count} pairs")
    for number in range(count):
        folder = top / "trials" / f"{title} {number}"
        if resumed:
            shutil.copytree(stopped, folder)
        commands = [arguments(name, top, folder, again=resumed) for name in names]
        logs = [folder.with_name(f"{folder.name} {which}.log") for which in (0, 1)]
        first = start(commands[0], logs[0])
        time.sleep(chance.random() if number % 2 else 0)
        second = start(commands[1], logs[1])
        runs = [finish(*each) for each in zip((first, second), commands, logs)]
        problems = [f"unclear refusal: {ended.lines[-1]}" for ended in runs if ended.code and not ended.refuses(folder)]
        finished = [name for name, ended in zip(names, runs) if ended.code == 0]
        if not finished or (len(finished) == 2 and title != REPEATED):
            problems.append("silent loss: both ended with exit code 0" if finished else "no result: both failed")
        mixed = min((compare(folder, top, name) for name in finished), key=len, default=[])
        outcome.add(folder, problems + [f"mixed result: {'; '.join(mixed)}"] * bool(mixed), runs)
    return outcome


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """Mount a tmpfs of this many bytes on a new folder; yields whether that is possible here."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.rmdir()


def fill(disk: Path, room: int) -> None:
    """Write a file that leaves this many bytes of a disk free, whatever else is being written."""
    with (disk / "filler").open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while (excess := shutil.disk_usage(disk).free - room) > 0:
            stream.write(bytes(min(excess, 2**22)))


def fill_and_free(top: Path, name: str, disk: Path, room: int) -> tuple[list[str], list[Ended]]:
    """Run a command while its disk fills up, and again after space is freed; returns the problems and the runs.

    Training is first refused for the little space; then its disk fills up after its first checkpoint.
    """
    folder, log, problems = disk / "trial", disk.with_name(f"{disk.name}.log"), []
    command = arguments(name, top, folder)
    fill(disk, room)
    if name == "training":
        refused = finish(start(command, log), command, log)
        if not refused.refuses(folder) or folder.exists():
            problems.append(f"not refused: {refused.lines[-1]}")
        (disk / "filler").unlink()
    process = start(command, log)
    while name == "training" and process.poll() is None:
        if any(folder.glob("out/checkpoint-*")):
            fill(disk, room)
            break
        time.sleep(0.002)
    full = finish(process, command, log)
    if full.code == 0:
        return problems + compare(folder, top, name), [full]
    if not full.refuses(folder):
        problems.append(f"unclear error: {full.lines[-1]}")
    # Files may be missing; the samples of a training run are those of its last validation.
    differences = [d for d in compare(folder, top, name) if not re.match("missing|different: out/samples", d)]
    problems += [f"half written: {difference}" for difference in differences]
    (disk / "filler").unlink(missing_ok=True)
    repeated = run(arguments(name, top, folder, again=True), folder)
    problems += [f"not continued: {repeated.lines[-1]}"] * bool(repeated.code)
    return problems + compare(folder, top, name), [full, repeated]


def try_disks(top: Path, name: str, count: int, chance: random.Random) -> Outcome:
    outcome, full = Outcome(f"{name}, on a disk that fills up"), 0
    size = 3 * 2**20 + (MIN_FREE_BYTES if name == "training" else 0)
    needed = sum(os.stat(top / "undisturbed" / name / file).st_size for file in contents(top / "undisturbed" / name))
    for number in range(count):
        disk, room = top / "trials" / f"disk {name} {number}", int((number + chance.random()) / count * 0.9 * needed)
        with small_disk(disk, size) as mounted:
            if not mounted:
                return outcome
            problems, runs = fill_and_free(top, name, disk, room)
            outcome.add(disk, problems, runs)
            full += runs[0].code != 0
    outcome.count = f"{full} full of {count} disks"
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills of each command")
    parser.add_argument("--pairs", type=int, default=6, help="pairs of each kind")
    parser.add_argument("--disks", type=int, default=4, help="disks for each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder")
    options = parser.parse_args()
    top = options.output_dir.resolve()
    if top.exists():
        sys.exit(f"error: --output_dir {options.output_dir} already exists; remove it, or give another name.")

    def chance(scenario: str) -> random.Random:
        return random.Random(f"{options.seed} {scenario}")

    undisturbed, stopped, outcomes = prepare(top), top / "stopped", []
    for name in KILLED if options.kills else ():
        outcomes.append(try_kills(top, name, options.kills, undisturbed[name], chance(name)))
    if options.pairs:
        half_way = undisturbed["training"].writing / 2
        run(arguments("training", top, stopped), stopped, ("write", half_way))
        outcomes += [try_pairs(top, title, options.pairs, chance(title), stopped) for title in PAIRS]
    if options.disks:
        outcomes += [try_disks(top, name, options.disks, chance(f"disk {name}")) for name in FILLED]
    lines = ["| what was tried | how many | fell short |", "| --- | --- | --- |"]
    lines += [outcome.row() for outcome in outcomes]
    lines += ["", f"Seed {options.seed}; python {platform.python_version()}, {platform.platform()}."]
    lines += ["", *(f"    {line}" for outcome in outcomes for line in outcome.details)]
    text = "\n".join(lines).rstrip()
    print(text)
    (top / "reliability.md").write_text(text + "\n")
    sys.exit(any(outcome.shortfalls for outcome in outcomes))


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
