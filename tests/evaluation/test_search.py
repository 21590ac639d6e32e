from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from efficientclip import __version__
from efficientclip.cli import main
from efficientclip.data.pictures import decode_square
from efficientclip.data.store import Store
from efficientclip.errors import UserError
from efficientclip.evaluation import search as module
from efficientclip.evaluation.run import open_run
from efficientclip.evaluation.search import draw_matches, search
from tests.evaluation.conftest import PICTURES, World
from tests.formats import files, picture
from tests.prepare.tars import write_tar


def test_matches_are_the_nearest_images_with_their_captions(world: World) -> None:
    matches = search(world.run, "红猫", None, 5)
    store = Store(world.store)
    cosine_K = store.features.astype(np.float32) @ open_run(world.run).encode_texts(["红猫"])[0]
    np.testing.assert_allclose([match.score for match in matches], np.sort(cosine_K)[::-1][:5], atol=1e-6)
    best = int(cosine_K.argmax())
    captions = [pair["caption"] for pair in store.pairs().to_pylist() if pair["image_id"] == best]
    assert matches[0].captions == captions
    assert matches[0].pixels.shape == (module.EDGE, module.EDGE, 3)


def test_command_writes_a_readable_picture(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", str(world.run), "[红]猫$", "--data", str(world.tar), "--top", "99"]) == 0
    with Image.open(world.run / "search.png") as picture:
        picture.load()
        assert picture.width > 500 and picture.height > 500
    printed = capsys.readouterr().out
    assert "[红]猫$" in printed and printed.count("│") >= PICTURES


def test_only_its_own_picture_is_written_over(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "holiday.png"
    arguments = ["search", str(world.run), "猫", "--top", "1", "--output", str(file)]
    file.write_bytes(b"mine")
    with monkeypatch.context() as patched:
        patched.setattr(module, "search", None)
        assert main(arguments) == 2
    assert "holiday.png: exists, and efficientclip did not write it" in capsys.readouterr().err
    assert file.read_bytes() == b"mine"
    assert main([*arguments, "--replace"]) == 0
    with Image.open(file) as picture:
        assert picture.info["Software"] == f"made by efficientclip {__version__}"
    assert main(arguments) == 0
    assert main([*arguments[:-1], "/", "--replace"]) == 2
    assert "/: is no file, but a folder; name a file" in capsys.readouterr().err
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert main(arguments[:-2]) == 2
    assert "cannot be written (Permission denied); name a picture elsewhere by --output" in capsys.readouterr().err


def test_without_a_chinese_font_the_picture_comes_with_a_notice(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "findSystemFonts", list)
    draw_matches(search(world.run, "猫", None, 1), "猫", tmp_path / "one.png")
    assert "fonts-wqy-microhei" in capsys.readouterr().err
    with Image.open(tmp_path / "one.png") as picture:
        picture.load()


def test_a_picture_that_is_gone_is_named(world: World, tmp_path: Path) -> None:
    pair = Store(world.store).pairs().to_pylist()[0]
    with pytest.raises(UserError, match="No such file"):
        module.square_picture(pair | {"shard": str(tmp_path / "gone.tar")}, 16)
    with pytest.raises(UserError, match=r"no picture at byte 3 .*prepare the store anew"):
        module.square_picture(pair | {"offset": 3}, 16)
    with pytest.raises(UserError, match="only text"):
        module.square_picture(pair | {"length": 0}, 16)


@pytest.mark.parametrize("kind", ["folder", "csv", "parquet", "tar"])
def test_pictures_without_captions_are_searched(
    world: World, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"{number}.png" for number in range(30)]
    contents = {name: picture(number) for number, name in enumerate(names)} | {"7.png": b"no picture"}
    files(tmp_path / "shop", contents)
    data, prefix = tmp_path / "shop", ""
    if kind == "csv":
        data, prefix = tmp_path / "t.csv", "shop/"
        data.write_text("image\n" + "".join(f"shop/{name}\n" for name in names))
    elif kind == "parquet":
        data = tmp_path / "t.parquet"
        pq.write_table(pa.table({"image": list(contents.values()), "key": names}), data)
    elif kind == "tar":
        data = write_tar(tmp_path / "t.tar", contents | {f"again/{name}": contents[name] for name in names[:5]})
    matches = search(world.run, "红猫", data, 5)
    opened = open_run(world.run)
    kept = [name for name in names if name != "7.png"]
    features = opened.frozen.encode([decode_square(contents[name], 16) for name in kept])
    cosine_K = features @ opened.encode_texts(["红猫"])[0]
    names_of = {name: name.removesuffix(".png") if kind == "tar" else prefix + name for name in kept}
    assert [match.key for match in matches] == [names_of[kept[at]] for at in np.argsort(-cosine_K)[:5]]
    np.testing.assert_allclose([match.score for match in matches], np.sort(cosine_K)[::-1][:5], atol=1e-3)
    assert all(match.captions == [] and match.pixels.shape == (module.EDGE, module.EDGE, 3) for match in matches)
    assert "left out: 1 × undecodable image" in capsys.readouterr().err


def test_a_folder_without_pictures_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no picture in it"):
        search(world.run, "猫", tmp_path, 5)
    with pytest.raises(UserError, match=r"--images, --image-column and its like: .*leave them out"):
        search(world.run, "猫", None, 5, images=tmp_path)
