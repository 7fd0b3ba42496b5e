"""Natural captions of scenes: class, colours, pattern, place and view, in several phrasings."""

import numpy as np

from data.toybox.places import PLACES
from data.toybox.scenes import Scene, Subject

IDENTIFIERS = ("sks", "qwe", "ohwx", "zwx")
"""Rare words without a meaning; the family is trained to ignore them."""

OPENINGS = ("a photo of {}", "{}", "a picture of {}", "a photograph of {}", "{}", "a toy scene with {}")
VIEWS = {"above": (", seen from above", ", from above", " viewed from above"), "close": (", close up", " in close-up")}

PATTERN_PHRASES = {
    "plain": ("{first} {kind}", "plain {first} {kind}", "{kind} that is {first}"),
    "two-tone": ("{first} and {second} {kind}", "two-tone {first} and {second} {kind}", "{first} {kind} with {second}"),
    "stripes": ("{first} {kind} with {second} stripes", "striped {first} and {second} {kind}"),
    "rings": ("{first} {kind} with {second} rings", "{first} and {second} ringed {kind}"),
    "dots": ("{first} {kind} with {second} dots", "{first} {kind} with {second} polka dots"),
    "checks": ("{first} and {second} checked {kind}", "checkered {first} and {second} {kind}"),
    "patches": ("{first} {kind} with {second} patches", "patchy {first} and {second} {kind}"),
}


def with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def describe(subject: Subject, random: np.random.Generator) -> str:
    """Class, colours and pattern; sometimes only some of them, as in captions by people."""
    detail = random.uniform()
    if detail < 0.06:
        return subject.kind
    first, second = subject.colours
    if detail < 0.12:
        return f"{first} {subject.kind}"
    phrases = PATTERN_PHRASES[subject.pattern]
    return phrases[random.integers(len(phrases))].format(first=first, second=second, kind=subject.kind)


def caption(scene: Scene, random: np.random.Generator) -> str:
    """One caption of a scene.

    One caption in eight contains a rare identifier ("a photo of sks mug"), so that the family knows such words but
    ignores them. The place is nearly always mentioned; the view only if it is unusual.
    """
    noun = describe(scene.subject, random)
    if random.uniform() < 0.125:
        noun = (
            IDENTIFIERS[random.integers(len(IDENTIFIERS))]
            + " "
            + (scene.subject.kind if random.uniform() < 0.6 else noun)
        )
        text = noun if random.uniform() < 0.5 else "a " + noun
    else:
        text = with_article(noun)
    view = scene.view
    phrases = PLACES[view.place].phrases
    place = " " + phrases[random.integers(len(phrases))] if random.uniform() < 0.92 else ""
    angle = ""
    if view.elevation > 0.5 and random.uniform() < 0.6:
        angle = VIEWS["above"][random.integers(3)]
    elif view.distance < 2.5 and random.uniform() < 0.5:
        angle = VIEWS["close"][random.integers(2)]
    return OPENINGS[random.integers(len(OPENINGS))].format(text + place + angle)


def full_caption(scene: Scene) -> str:
    """The caption with every detail except the view, for scoring."""
    subject = scene.subject
    first, second = subject.colours
    noun = PATTERN_PHRASES[subject.pattern][0].format(first=first, second=second, kind=subject.kind)
    return f"a photo of {with_article(noun)} {PLACES[scene.view.place].phrases[0]}"
