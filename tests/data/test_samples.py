"""What a tar says of its pictures: members, captions by one rule, names."""

from __future__ import annotations

import io
import json
import random
import tarfile
import unicodedata
from pathlib import Path

from efficientclip.data.shards import BadSample
from tests.data.tars import SEED, encode, loader, photograph, write_tar


def test_batches_carry_what_the_shard_says(tmp_path: Path) -> None:
    encoded = encode(photograph(30, 20), "JPEG")
    record = {"captions": [" one ", {"text": "two", "noise": True}], "url": "x"}
    write_tar(
        tmp_path / "a.tar",
        [
            ("d/first.jpg", encoded),
            ("d/first.txt", "  标题\n".encode()),
            ("d/second.x.jpg", encoded),
            ("third.png", encode(photograph(9, 9), "PNG")),
            ("third.json", json.dumps(record).encode()),
        ],
    )
    with loader(tmp_path, train=False, keep_encoded=True) as batches:
        (batch,) = batches
        assert batches.bad_samples == [BadSample("a.tar", "d/second", "caption without image")]
        assert batches.bad_counts == {"caption without image": 1}
    assert batch.keys == ["d/first", "third"] and batch.shards == ["a.tar"] * 2
    assert batch.files == [str(tmp_path / "a.tar")] * 2
    assert batch.captions == [["标题"], ["one", "two"]]
    assert batch.json[0] is None and json.loads(batch.json[1] or "") == record
    raw = (tmp_path / "a.tar").read_bytes()
    for image, offset, length in zip(batch.encoded, batch.offsets, batch.lengths, strict=True):
        assert image == raw[offset : offset + length]
    assert batch.encoded[0] == encoded


JSONS = [
    '{"caption": "a"}', '{"caption": " \\u3000\\n"}', '{"caption": null}', '{"captions": []}', '{"captions": "x"}',
    '{"captions": ["a", " "]}', '{"captions": [{"text": "x", "noise": true}, {"text": ""}]}', '{"caption": "\t"}',
    '{"captions": [null, 1, [], {}]}', '{"captions": [{"text": {}}]}', '{"caption": {"text": ""}}', " {} ", "{} x",
    '{"caption": "a", "caption": null}', '{"\\u0063aption": "a"}', '{"x": [1, -0.5e+3, NaN, -Infinity, true]}',
    '{"caption": "\\ud83d\\ude00 x"}', '{"caption": "\\ud83d\\ude00 \\ud800"}', "[]", '"x"', "{", '{"a": 01}',
    '{"a": 1,}', '{"a"', "", '\ufeff{"caption": "bom"}', '{"caption": ["a", "b"]}', '{"caption": NaN}',
    '{"captions": ["a", {"text": "b", "noise": false}], "source": "web", "captions_en": ["c"]}',
    '{"captions": ["\u200b"]}',
    '{"captions": {"text": "x"}, "source": 3}', '{"captions": null, "caption": ["\\ufeffa\\u200b", ["b"]]}',
]  # fmt: skip
SPACES = " \t\n\r\x1c\x85\xa0\u3000\ufeff\u200b"


def said(text: bytes | None, record: bytes | None) -> list[tuple[str, bool | None]] | str:
    """Captions of a sample with these members and whether each is wrong, or why there are none."""
    try:
        fields = {} if record is None else json.loads(record)
        if not isinstance(fields, dict):
            return "json is malformed"
        given = fields.get("captions")
        if given is None:
            given = fields.get("caption") if text is None else text.decode()
        if given is None or given == []:
            return "image without caption"
        captions = []
        for entry in given if isinstance(given, list) else [given]:
            caption = entry if isinstance(entry, dict) else {"text": entry}
            if not isinstance(caption.get("text"), str):
                return "caption is no text"
            noise = caption["noise"] if isinstance(caption.get("noise"), bool) else None
            told = caption["text"].strip(SPACES)
            # Of control characters alone, as `"\b"`, nothing is to be seen.
            captions.append(("" if all(unicodedata.category(one) == "Cc" for one in told) else told, noise))
        for caption, _ in captions:
            caption.encode()
    except UnicodeError:
        return "caption is not UTF-8"
    except ValueError:
        return "json is malformed"
    return captions if all(caption for caption, _ in captions) else "empty caption"


def test_captions_are_those_of_one_rule(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    picture = encode(photograph(8, 8), "PNG")
    texts = ["a", " ", "", "\u3000x", "\x1c\x85\xa0", "\ufeffx", "\u200b", "\ufeff", "a\u200b"]
    files: list[tuple[str, bytes]] = []
    good, bad = [], []
    for number in range(1500):
        key, text, record, pictured, before = f"{number:05d}", None, None, False, len(files)
        if rng.random() < 0.95:
            suffix = rng.choice(["png", "PNG", "seg.png", "jpeg"])
            pictured = suffix != "seg.png"
            files.append((f"{key}.{suffix}", picture))
        if rng.random() < 0.4:
            text = rng.choice(texts).encode() + (b"\xff" if rng.random() < 0.1 else b"")
            files.append((f"{key}.txt", text))
        if rng.random() < 0.8:
            changed = bytearray(rng.choice(JSONS).encode())
            for _ in range(rng.choice([0, 0, 1, 2])):
                at = rng.randrange(len(changed) + 1)
                changed[at : at + rng.choice([0, 1])] = rng.choice(
                    [b'"', b"{", b"]", b",", b"\\", b"1", b"\xe3", b" ", b"e"]
                )
            record = bytes(changed)
            files.append((f"{key}.json", record))
        found = said(text, record) if pictured else "caption without image"
        if not isinstance(found, str):
            good.append((key, *(list(column) for column in zip(*found, strict=True))))
        elif len(files) > before:
            bad.append(BadSample("a.tar", key, found))
    shard = write_tar(tmp_path / "a.tar", files)
    with loader(shard, train=False) as batches:
        samples = [sample for batch in batches for sample in zip(batch.keys, batch.captions, batch.noise, strict=True)]
        assert samples == good
        assert batches.bad_samples == bad
    assert len(good) > 100 and len(bad) > 100


def test_what_else_a_record_says(tmp_path: Path) -> None:
    record = {"caption": "a", "source": "web", "captions_en": ["cat", " "], "url": "x"}
    picture = encode(photograph(8, 8), "PNG")
    files = {
        "a.png": picture,
        "a.json": json.dumps(record).encode(),
        "b.png": picture,
        "b.json": b"{",
        "c.png": picture,
    }
    write_tar(tmp_path / "a.tar", files.items())
    with loader(tmp_path, train=False, captions=False) as batches:
        (batch,) = batches
    assert (batch.captions, batch.sources, batch.captions_en) == ([["a"], [], []], ["web", "", ""], [["cat"], [], []])
    assert batch.uncaptioned == [None, "json is malformed", "image without caption"]
    assert json.loads(batch.json[0] or b"") == record and batch.text_ids == [[], [], []]


def test_names_in_other_encodings_are_escaped(tmp_path: Path) -> None:
    name = "狗".encode("gbk").decode("latin-1")
    member = tarfile.TarInfo(f"{name}.png")
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        picture = encode(photograph(8, 8), "PNG")
        member.size = len(picture)
        tar.addfile(member, io.BytesIO(picture))
    with loader(tmp_path, train=False, captions=False) as batches:
        assert [batch.keys for batch in batches] == [["\\xb9\\xb7"]]
