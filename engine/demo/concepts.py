"""Concepts that the pictures show, who may see which of them, and wrong captions at random."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .packages import member

TRAIN_STYLES = ("google", "twitter", "openmoji")
HELD_OUT_STYLE = "fluent"
TEST_BELOW, VALIDATION_BELOW = 15, 20
GENDER = re.compile(r"\b(man|woman|person|men|women|people)\b")


@dataclass(frozen=True)
class Concept:
    """One emoji: `key` is its code points without FE0F, captions begin with the name, `subgroup` is Unicode's."""

    key: str
    chinese: tuple[str, ...]
    english: tuple[str, ...]
    subgroup: str


@dataclass(frozen=True)
class Picture:
    concept: Concept
    style: str
    png: bytes
    captions: list[dict[str, Any]] = field(default_factory=list)


def read_concepts(packages: dict[str, Path]) -> list[Concept]:
    """Emoji with a Chinese and an English CLDR name; flags and components left out."""
    chinese, english = (_annotations(packages, language) for language in ("zh", "en"))
    emoji = json.loads(member(packages["emoji-datasource-google"], "package/emoji.json"))
    concepts = []
    for entry in emoji:
        points = [point for point in entry["unified"].split("-") if point != "FE0F"]
        character = "".join(chr(int(point, 16)) for point in points)
        if entry["category"] in ("Flags", "Component") or character not in chinese or character not in english:
            continue
        concepts.append(Concept("-".join(points).lower(), chinese[character], english[character], entry["subcategory"]))
    return concepts


def _annotations(packages: dict[str, Path], language: str) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for package, folder in (
        ("cldr-annotations-full", "annotations"),
        ("cldr-annotations-derived-full", "annotationsDerived"),
    ):
        content = json.loads(member(packages[package], f"package/{folder}/{language}/annotations.json"))
        for character, entry in content[folder]["annotations"].items():
            if "tts" in entry:
                captions = tuple(dict.fromkeys([entry["tts"][0], *entry.get("default", [])]))
                found.setdefault(character.replace("\ufe0f", ""), captions)
    return found


def bucket(text: str) -> int:
    """0 to 99, fixed for ever by the text."""
    return int(hashlib.sha1(text.encode()).hexdigest(), 16) % 100


def split_of(concept: Concept) -> str:
    """train, val or test by group: drawings that differ in gender alone stay on one side."""
    name = concept.english[0]
    number = bucket(re.sub(r"[^a-z0-9]+", " ", GENDER.sub("", name.lower())).strip() or name)
    return "test" if number < TEST_BELOW else "val" if number < VALIDATION_BELOW else "train"


def divide(concepts: list[Concept], pngs: dict[str, dict[str, bytes]]) -> dict[str, list[Picture]]:
    """Pictures by split: concepts and one style are held out of training."""
    splits: dict[str, list[Picture]] = {
        name: []
        for name in (
            *("train", "val_seen", "val_concept", "val_both"),
            *("test_concept", "test_concept_google", "test_vendor", "test_both"),
        )
    }
    for concept in concepts:
        side = split_of(concept)
        for style, drawn in pngs.items():
            if concept.key not in drawn:
                continue
            picture = Picture(concept, style, drawn[concept.key], [{"text": concept.chinese[0], "noise": False}])
            if style == HELD_OUT_STYLE:
                splits[{"train": "test_vendor", "val": "val_both", "test": "test_both"}[side]].append(picture)
            elif side != "train":
                splits[f"{side}_concept"].append(picture)
                if side == "test" and style == "google":
                    splits["test_concept_google"].append(picture)
            elif style == "openmoji" and int(hashlib.sha1(concept.key.encode()).hexdigest(), 16) % 5 == 0:
                splits["val_seen"].append(picture)
            else:
                captions = [{"text": caption, "noise": False} for caption in concept.chinese]
                splits["train"].append(Picture(concept, style, picture.png, captions))
    return splits


def assign_noise(pictures: list[Picture], share: float, seed: int) -> list[Picture]:
    """Give exactly round(share * pairs) pairs another training concept's caption; the seed also shuffles."""
    generator = np.random.default_rng(seed)
    pairs = [(number, place) for number, picture in enumerate(pictures) for place in range(len(picture.captions))]
    noisy = generator.permutation(len(pairs))[: round(share * len(pairs))]
    pool = sorted({picture.concept.key: picture.concept for picture in pictures}.items())
    captions = [(key, caption) for key, concept in pool for caption in concept.chinese]
    result = [Picture(p.concept, p.style, p.png, [dict(entry) for entry in p.captions]) for p in pictures]
    for pair in sorted(noisy):
        number, place = pairs[pair]
        picture = result[number]
        taken = set(picture.concept.chinese) | {entry["text"] for entry in picture.captions}
        while True:
            key, caption = captions[generator.integers(len(captions))]
            if key != picture.concept.key and caption not in taken:
                break
        picture.captions[place] = {
            "text": caption,
            "noise": True,
            "original": picture.captions[place]["text"],
        }
    return [result[number] for number in generator.permutation(len(result))]
