"""What an image shows: subjects, places, cameras and lights, sampled from a seed; and what is held out for tests."""

# Colours are 3-tuples, whose length the type checker cannot infer.
# pyright: reportArgumentType=false, reportCallIssue=false

import colorsys
import dataclasses
import zlib

import numpy as np

from data.toybox.places import PLACES, STUFF
from data.toybox.shapes import CLASSES, SHAPE_PARAMETERS
from data.toybox.surfaces import COLOURS, NEUTRALS, PATTERNS

SEMANTIC_CLASSES = (*STUFF, *CLASSES)
"""Names of a semantic map's indices."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """One toy; it looks the same in all its images.

    Attributes:
        kind: its class.
        shape: free parameters of the class, each 0 to 1.
        colours: names of the first and the second colour.
        rgb: exact linear RGB of the two colours.
        pattern: one of ``PATTERNS``.
        scale, phase: fineness and offset of the pattern, 0 to 1.
        neutral: linear RGB of the details.
    """

    kind: str
    shape: tuple[float, ...]
    colours: tuple[str, str]
    rgb: tuple[tuple[float, float, float], tuple[float, float, float]]
    pattern: str
    scale: float
    phase: float
    neutral: tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class View:
    """How a subject is photographed.

    Attributes:
        place: key of ``PLACES``.
        variation: the place's free parameters, each 0 to 1.
        yaw: rotation of the toy in radians; 0 shows its front.
        azimuth, elevation, distance: of the camera around the toy (radians, radians, toy units).
        shift: offset of the toy from the centre of the image, in units of half an image.
        sun: azimuth and elevation of the light in radians.
        exposure: factor for all light.
    """

    place: str
    variation: tuple[float, float, float, float]
    yaw: float
    azimuth: float
    elevation: float
    distance: float
    shift: tuple[float, float]
    sun: tuple[float, float]
    exposure: float


@dataclasses.dataclass(frozen=True)
class Scene:
    subject: Subject
    view: View


def _share(*words: str) -> float:
    """A fixed hash, 0 to 1, of a combination of words."""
    return zlib.crc32("/".join(words).encode()) / 2**32


def is_unseen_subject(subject: Subject) -> bool:
    """Whether the subject's (class, colours, pattern) is among the 10 percent held out from the family's training."""
    return _share(subject.kind, *sorted(subject.colours), subject.pattern) < 0.1


def is_unseen_pair(kind: str, place: str) -> bool:
    """Whether this class in this place is among the 5 percent of pairs held out from the family's training."""
    return _share(kind, place) < 0.05


def random_subject(random: np.random.Generator, kind: str | None = None) -> Subject:
    """A random subject, of class ``kind`` if given."""
    kind = kind or CLASSES[random.integers(len(CLASSES))]
    names = list(COLOURS)
    first, second = (names[i] for i in random.choice(len(names), 2, replace=False))
    pattern = PATTERNS[random.integers(len(PATTERNS))]
    if pattern == "plain":
        second = first
    jitter = [_jittered(COLOURS[name], random) for name in (first, second)]
    if pattern == "plain":  # the accents of a plain toy are a darker tone of its colour
        jitter[1] = tuple(0.55 * channel for channel in jitter[0])
    return Subject(
        kind,
        tuple(random.uniform(size=SHAPE_PARAMETERS).tolist()),
        (first, second),
        (jitter[0], jitter[1]),
        pattern,
        float(random.uniform()),
        float(random.uniform()),
        NEUTRALS[random.integers(len(NEUTRALS))],
    )


def _jittered(rgb: tuple[float, float, float], random: np.random.Generator) -> tuple[float, float, float]:
    hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
    hue, saturation = hue + random.uniform(-0.012, 0.012), saturation * random.uniform(0.88, 1.0)
    return colorsys.hsv_to_rgb(hue % 1, min(saturation, 1), value * random.uniform(0.85, 1.08))


def random_view(random: np.random.Generator, kind: str, place: str | None = None) -> View:
    """A random view of a toy of a class, in ``place`` if given, otherwise in a place not held out for the class."""
    if place is None:
        seen = [name for name in PLACES if not is_unseen_pair(kind, name)]
        place = seen[random.integers(len(seen))]
    low = random.uniform() < 0.72
    return View(
        place=place,
        variation=tuple(random.uniform(size=4).tolist()),
        yaw=float(random.uniform(-1.25, 1.25)),
        azimuth=float(random.uniform(-0.3, 0.3)),
        elevation=float(random.uniform(0.06, 0.28) if low else random.uniform(0.28, 0.72)),
        distance=float(random.uniform(2.4, 3.15)),
        shift=(float(random.uniform(-0.15, 0.15)), float(random.uniform(-0.10, 0.04))),
        sun=(float(random.uniform(-1.2, 1.2)), float(random.uniform(0.6, 1.05))),
        exposure=float(random.uniform(0.88, 1.12)),
    )


def training_subject(number: int) -> Subject:
    """Subject number ``number`` of those that the family is trained on."""
    return _sample_subject(number, unseen=False)


def unseen_subject(number: int) -> Subject:
    """Subject number ``number`` of those that no model of the family saw; number i is of class i modulo 14."""
    return _sample_subject(number, unseen=True)


def _sample_subject(number: int, unseen: bool) -> Subject:
    random = np.random.default_rng((number, int(unseen)))
    while True:
        subject = random_subject(random, CLASSES[number % len(CLASSES)])
        if is_unseen_subject(subject) == unseen:
            return subject


def photograph(subject: Subject, seed: int, number: int, place: str | None = None) -> Scene:
    """The scene of photo number ``number`` of a subject."""
    return Scene(subject, random_view(np.random.default_rng((seed, number, 7)), subject.kind, place))
