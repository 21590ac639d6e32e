"""An exported run opens as Hugging Face's Chinese-CLIP, or as the engine's own class, and answers as the run did."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image
from transformers import AutoModel, AutoProcessor, ChineseCLIPModel, ChineseCLIPProcessor, ResNetConfig, pipeline

import efficientclip
from efficientclip import export as module
from efficientclip.cli import main
from efficientclip.config import ImageTower, TextTower, load_config, save_config
from efficientclip.data.pictures import decode_square
from efficientclip.data.store import Store
from efficientclip.errors import UserError
from efficientclip.evaluation.card import Licence, model_card
from efficientclip.evaluation.run import Run, open_run
from efficientclip.export import export
from efficientclip.files import digests, lock
from efficientclip.files.ownership import MARK
from efficientclip.model.efficientclip import EfficientCLIP, EfficientCLIPConfig, build_model
from efficientclip.model.frozen import image_tower_name
from efficientclip.model.lite import EfficientNetLiteConfig
from efficientclip.noise.cross_fit import CrossFit, SourceRate, write_cross_fit
from tests import tiny
from tests.data.tars import encode, photograph
from tests.formats import files
from tests.model import hub

LONG = "猫狗" * 30
TEXTS = ["猫", "红蓝黄绿大小", LONG, "天地"]
# The pipeline cuts no text.
SHORT = [0, 1, 3]
STACK = {
    "model_type": "efficientclip_text",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "clip": {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48},
}


def trained(folder: Path, tower: str, **changes: Any) -> Path:
    """A text run against an image tower, of random weights; metrics as the trainer leaves them."""
    convolutions = {
        "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
        "lite": EfficientNetLiteConfig(stages=[[1, 3, 1, 1, 8], [2, 5, 2, 2, 8]], stem_channels=8, hidden_size=16),
    }
    if tower in convolutions:
        described = {**convolutions[tower].to_dict(), "image_size": hub.PIXELS}
        image = EfficientCLIP(EfficientCLIPConfig(image=described, width=tiny.WIDTH))
        image.save_pretrained(folder / tower / "model")
    elif tower == "fitted":
        backbone = hub.clip_vision(folder / "clip").vision_model
        described = {**backbone.config.to_dict(), "image_size": hub.PIXELS, "fitted": [0, -1]}
        image = EfficientCLIP(EfficientCLIPConfig(image=described, width=tiny.WIDTH), image_backbone=backbone)
        image.save_pretrained(folder / tower / "model")
    else:
        getattr(hub, tower)(folder / tower)
    tiny.pair_store(folder / "store")
    settings = {
        "model__image_tower": {"pretrained": str(folder / tower), "size": hub.PIXELS, "mean": [0.4, 0.5, 0.6]},
        "training__max_caption_tokens": 20,
        **changes,
    }
    config = load_config(tiny.config(folder, **settings))
    manifest = folder / "store" / "manifest.json"
    stored = json.loads(manifest.read_text())
    del stored["sha256"]
    tower_name = config.model.image_tower and image_tower_name(config.model.image_tower)
    manifest.write_text(json.dumps({**stored, "tower": tower_name, "source": "/data/pictures"}))
    model = build_model(config.model, seed=0, vocabulary=stored["vocabulary"], sides=("text",))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        model.logit_scale.fill_(9.0)  # exp(9) lies beyond the clamp
    run = folder / "run"
    model.save_pretrained(run / "model")
    save_config(config, run / "config.yaml")
    figures = {"R@1": 12.5, "R@5": 40.0, "R@10": 62.5}
    report = {"held": {"t2i": figures, "i2t": {**figures, "R@1": 17.5}, "candidates": 1234, "texts": 99}}
    lines = [
        {"step": 1, "visits": 32, "pairs_per_s": 16.0},
        {"step": 20, "visits": 640, "pairs_per_s": 76.0},
        {"step": 20, "visits": 640, "validation": report},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2')
    return run


@pytest.fixture(autouse=True)
def seed() -> None:
    seed = int(np.random.default_rng().integers(2**31))
    print(f"seed {seed}")
    torch.manual_seed(seed)


def pictures() -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    random = np.random.default_rng(int(torch.randint(2**31, ())))
    return [random.integers(0, 256, (hub.PIXELS, hub.PIXELS, 3), np.uint8) for _ in range(3)]


def answers(opened: Run, squares: list[Any]) -> tuple[torch.Tensor, torch.Tensor, float]:
    scale = min(float(opened.model.logit_scale.detach().exp()), opened.config.model.logit_scale_max)
    return torch.from_numpy(opened.encode_texts(TEXTS)), torch.from_numpy(opened.frozen.encode(squares)), scale


@pytest.mark.parametrize("tower", ["clip", "chinese_clip"])
@pytest.mark.parametrize("text", ["bert", "chinese_clip"])
def test_bert_and_vit_open_as_chinese_clip(tmp_path: Path, tower: str, text: str) -> None:
    changes: dict[str, Any] = {}
    if text == "chinese_clip":
        hub.chinese_clip(tmp_path / "text")
        changes["model__text_tower"] = {"pretrained": str(tmp_path / "text")}
    run = trained(tmp_path, tower, **changes)
    assert export(run, tmp_path / "out") is ChineseCLIPModel
    model = ChineseCLIPModel.from_pretrained(tmp_path / "out").eval()
    processor = ChineseCLIPProcessor.from_pretrained(tmp_path / "out")
    squares = pictures()
    texts_ND, images_ND, scale = answers(open_run(run), squares)
    tokens = processor(text=TEXTS, padding=True, truncation=True, return_tensors="pt")
    pixels = processor(images=[Image.fromarray(square) for square in squares], return_tensors="pt")
    assert tokens["input_ids"].shape == (len(TEXTS), 20)
    with torch.no_grad():
        whole = model(**tokens, **pixels)
    torch.testing.assert_close(whole.text_embeds, texts_ND, rtol=0, atol=1e-5)
    torch.testing.assert_close(whole.image_embeds, images_ND, rtol=0, atol=1e-5)
    assert float(model.logit_scale.detach().exp()) == pytest.approx(scale, rel=1e-5) == pytest.approx(100)
    torch.testing.assert_close(whole.logits_per_text, 100 * texts_ND @ images_ND.T, rtol=0, atol=1e-3)
    classifies(tmp_path / "out", squares[0], (100 * texts_ND @ images_ND[0])[SHORT])
    # Photographs of any shape are resized and cut as `prepare` does.
    photographs = [photograph(*shape) for shape in ((640, 427), (427, 640), (301, 300), (75, 64), (33, 50))]
    prepared = [decode_square(encode(picture, "PNG"), hub.PIXELS) for picture in photographs]
    with torch.no_grad():
        features_ND = model(**tokens, **processor(images=photographs, return_tensors="pt")).image_embeds
    assert (features_ND * torch.from_numpy(open_run(run).frozen.encode(prepared))).sum(1).min() > 0.9999


@pytest.mark.parametrize(
    ("tower", "text"),
    [
        ("resnet", {}),
        ("fitted", {}),
        ("clip", {"pooling": "mean"}),
        ("clip", {"architecture": STACK, "pooling": "last"}),
    ],
    ids=["convolutions", "fitted head", "mean", "published"],
)
def test_other_towers_open_as_the_engines_own_class(tmp_path: Path, tower: str, text: dict[str, Any]) -> None:
    bert = yaml_tower(tmp_path)
    run = trained(tmp_path, tower, model__text_tower={**bert, **text})
    assert export(run, tmp_path / "out") is EfficientCLIP
    squares = pictures()
    texts_ND, images_ND, scale = answers(open_run(run), squares)
    processor = ChineseCLIPProcessor.from_pretrained(tmp_path / "out")
    tokens = processor(text=TEXTS, padding=True, truncation=True, return_tensors="pt")
    pixels = processor(images=[Image.fromarray(square) for square in squares], return_tensors="pt")
    for opens in (EfficientCLIP, AutoModel):
        model = opens.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(model.get_text_features(**tokens), texts_ND, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.get_image_features(**pixels), images_ND, rtol=0, atol=1e-5)
        output = model(pixels=pixels["pixel_values"])
        assert float(output["logit_scale"].detach()) == pytest.approx(scale, rel=1e-5)
    classifies(tmp_path / "out", squares[0], (scale * texts_ND @ images_ND[0])[SHORT])
    assert efficientclip.EfficientCLIP is EfficientCLIP
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\nfrom efficientclip import EfficientCLIP\n" in card and "where the class was imported as above" in card


def classifies(folder: Path, square: Any, logits: torch.Tensor) -> None:
    """Hugging Face's own pipeline opens `folder` and finds the labels SHORT by these logits."""
    pipe = pipeline("zero-shot-image-classification", model=str(folder))
    found = pipe(Image.fromarray(square), candidate_labels=[TEXTS[at] for at in SHORT], hypothesis_template="{}")
    scores = {one["label"]: one["score"] for one in found}
    for at, expected in zip(SHORT, logits.softmax(0).tolist(), strict=True):
        assert scores[TEXTS[at]] == pytest.approx(expected, abs=1e-3)
    assert type(AutoProcessor.from_pretrained(folder)) is ChineseCLIPProcessor


@pytest.mark.parametrize("tower", ["clip", "resnet"])
def test_the_folder_tells_sentence_transformers_what_to_ask(tmp_path: Path, tower: str) -> None:
    run, squares = trained(tmp_path, tower), pictures()
    opens: Any = export(run, tmp_path / "out")
    texts_ND, images_ND, _ = answers(open_run(run), squares)
    processor = ChineseCLIPProcessor.from_pretrained(tmp_path / "out")
    given = {
        "text": processor(text=TEXTS, padding=True, truncation=True, return_tensors="pt"),
        "image": processor(images=[Image.fromarray(square) for square in squares], return_tensors="pt"),
    }
    told = json.loads((tmp_path / "out" / "sentence_bert_config.json").read_text())
    assert told["modality_config"].keys() == given.keys() and told["module_output_name"] == "sentence_embedding"
    model = opens.from_pretrained(tmp_path / "out").eval()
    assert model.config.projection_dim == tiny.WIDTH
    for (side, asked), expected_ND in zip(told["modality_config"].items(), (texts_ND, images_ND), strict=True):
        with torch.no_grad():
            found = getattr(model, asked["method"])(**given[side])
        found_ND = found if asked["method_output_name"] is None else getattr(found, asked["method_output_name"])
        torch.testing.assert_close(torch.nn.functional.normalize(found_ND), expected_ND, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tower", ["clip", "resnet"])
def test_sentence_transformers_encodes_texts_and_pictures(tmp_path: Path, tower: str) -> None:
    library = pytest.importorskip("sentence_transformers")
    run, squares = trained(tmp_path, tower), pictures()
    export(run, tmp_path / "out")
    texts_ND, images_ND, _ = answers(open_run(run), squares)
    encoder = library.SentenceTransformer(str(tmp_path / "out"))
    np.testing.assert_allclose(encoder.encode(TEXTS), texts_ND, atol=1e-5)
    found_ND = encoder.encode([Image.fromarray(square) for square in squares])
    np.testing.assert_allclose(found_ND, images_ND, atol=1e-5)
    assert encoder.get_embedding_dimension() == tiny.WIDTH


def yaml_tower(folder: Path) -> dict[str, Any]:
    tower = load_config(tiny.config(folder)).model.text_tower
    return {"architecture": tower.architecture} if tower else {}


def test_the_card_tells_data_resources_and_recall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(tmp_path, "clip", mlm__texts=str(tmp_path / "texts"))
    export(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    store = Store(tmp_path / "store").manifest
    for part in (
        "from transformers import ChineseCLIPModel",
        f"- {store['pairs']:,} pairs of {store['images']:,} images and {store['captions']:,} captions: pictures",
        "masked-language modelling: texts",
        "- 640 pair visits in batches of 32",
        # 32 visits at 16 a second, 608 at 76: ten seconds.
        "- 0.0028 hours of training steps, 64 pairs a second",
        "| held | text → image | 1,234 | 12.5 | 40.0 | 62.5 |",
        "| held | image → text | 99 | 17.5 | 40.0 | 62.5 |",
    ):
        assert part in card
    assert str(tmp_path) not in card
    by_hand = {"right": 1234, "wrong": 56, "sha256": ""}
    monkeypatch.setattr("efficientclip.evaluation.card.run_identity", lambda folder: {"verdicts": by_hand})
    results = {"t2i": {"R@1": 1.5, "R@5": 2, "R@10": 3}, "i2t": {"R@1": 4, "R@5": 5, "R@10": 6}}
    results |= {"candidates": 7, "texts": 8}  # type: ignore[dict-item]
    (run / "results.json").write_text(json.dumps({"made_by": "made by efficientclip 0", "test": results}))
    export(run, tmp_path / "again")
    card = (tmp_path / "again" / "README.md").read_text()
    assert "| test | text → image | 7 | 1.5 | 2.0 | 3.0 |" in card and "held" not in card
    assert "- a person's verdicts: 1,234 pairs never dropped, 56 never trained on\n" in card
    (run / "results.json").write_text('{"test": {"t2i": ')
    with pytest.raises(UserError, match=r"results\.json: broken .*write it anew by `efficientclip report "):
        export(run, tmp_path / "broken")
    (run / "results.json").unlink()
    (run / "confidence.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(UserError, match=r"confidence\.parquet: broken"):
        export(run, tmp_path / "broken")
    assert not (tmp_path / "broken").exists() and not list(tmp_path.glob(".broken*"))


def test_the_cards_head_is_what_the_hub_reads(tmp_path: Path) -> None:
    run = trained(tmp_path, "clip")
    export(run, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    told = {"language": "zh", "license": None, "library_name": "transformers", "base_model": None}
    assert {name: card.data.to_dict().get(name) for name in told} == told
    assert "None is named yet" in card.text and card.data.model_name == "run"
    found = {(one.task_type, one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results}
    assert found.keys() == {
        (task, "held", f"recall_at_{k}")
        for task in ("text-to-image-retrieval", "image-to-text-retrieval")
        for k in (1, 5, 10)
    }
    assert found["text-to-image-retrieval", "held", "recall_at_1"] == 12.5
    assert found["image-to-text-retrieval", "held", "recall_at_1"] == 17.5
    # What is written is what is read, to the last field.
    assert ModelCardData(**yaml.safe_load(card.data.to_yaml())).to_dict() == card.data.to_dict()
    (run / "metrics.jsonl").unlink()
    export(run, tmp_path / "unmeasured", licence="cc-by-nc-4.0")
    card = ModelCard.load(tmp_path / "unmeasured" / "README.md")
    assert card.data.license == "cc-by-nc-4.0" and card.data.eval_results is None and "Licence" not in card.text
    assert "model_name" not in card.data.to_dict() and "Not measured" in card.text


def test_the_card_names_models_of_the_hub_and_no_folder_of_ours(tmp_path: Path) -> None:
    run = trained(tmp_path, "clip")
    opened = open_run(run)
    towers = opened.config.model.model_copy(
        update={"text_tower": TextTower(pretrained="org/bert"), "image_tower": ImageTower(pretrained="org/vit")}
    )
    opened.config = opened.config.model_copy(update={"model": towers})
    text = model_card(opened, opened.model, Licence(), onnx=False)
    assert ModelCard(text).data.base_model == ["org/bert", "org/vit"] and "(`org/vit`)" in text
    assert ModelCard(text).data.library_name == "efficientclip"


def test_the_card_tells_sources_and_noise(tmp_path: Path) -> None:
    run = trained(tmp_path, "clip", confidence__cross_fit=str(tmp_path / "folds"), confidence__score="online")
    card = exported(run, tmp_path / "without")
    assert "what `efficientclip cross-fit` found is not at hand" in card and "| source |" not in card
    table = pq.read_table(tmp_path / "store" / "pairs.parquet")
    pairs = len(table)
    names = pa.array(["web" if row % 3 != 1 else "shop|cn" for row in range(pairs)])
    pq.write_table(
        table.set_column(table.column_names.index("source"), "source", names), tmp_path / "store" / "pairs.parquet"
    )
    tiny.finished_again(tmp_path / "store")
    kept = np.arange(pairs) % 3 != 0
    columns = {"row": np.arange(pairs), "score": np.zeros(pairs), "kept": kept}
    pq.write_table(pa.table(columns), run / "confidence.parquet")
    zeros = np.zeros(pairs)
    rates = (SourceRate("web", 160, 0.3, 0.25, 0.35), SourceRate("shop|cn", 80, 0.4, 0.1, 0.9))
    (tmp_path / "folds").mkdir()
    whole = SourceRate("all", pairs, 0.31, 0.28, 0.34)
    found = CrossFit(0.31, 4096, zeros.astype(np.int8), zeros, zeros, zeros, zeros, sources=rates, whole=whole)
    found = replace(found, near=SourceRate("near misses", pairs, 0.12, 0.1, 0.14))
    write_cross_fit(tmp_path / "folds", Store(tmp_path / "store"), found)
    card = exported(run, tmp_path / "with")
    for line in (
        "| web | 160 | 50.0% |",
        "| shop\\|cn | 80 | 100.0% |",
        "| all | 240 | 31.0% | 28.0% to 34.0% |",
        "| web | 160 | 30.0% | 25.0% to 35.0% |",
        "| shop\\|cn | 80 | cannot be told | 10.0% to 90.0% |",
        "12.0% more (10.0% to 14.0%) are near misses, or rare names of what a picture shows: none is dropped for it.",
        "- before it 4,096 pair visits of the two towers that estimated the noise",
    ):
        assert line in card.splitlines(), line


def exported(run: Path, out: Path) -> str:
    export(run, out)
    return (out / "README.md").read_text()


@pytest.mark.parametrize("given", ["Apache-2.0", "Apache 2.0", "other", "=https://a.b", "mine=", ""])
def test_a_licence_that_the_hub_would_refuse_is_told_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    arguments = ["export", str(tmp_path / "none"), str(tmp_path / "out"), f"--license={given}"]
    refused(capsys, arguments, f"--license {given}: give the hub's identifier, in small letters (apache-2.0,")


def test_a_licence_of_ones_own_has_a_name_and_a_link(tmp_path: Path) -> None:
    export(trained(tmp_path, "clip"), tmp_path / "out", licence="acme-1.0=https://acme.cn/licence?id=1")
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (data.license, data.license_name) == ("other", "acme-1.0")
    assert data.license_link == "https://acme.cn/licence?id=1"


def test_what_cannot_be_exported_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(run: Path, out: Path, message: str) -> None:
        assert main(["export", str(run), str(out)]) == 2
        printed = capsys.readouterr().err
        assert message in printed and printed.count("error:") == 1

    run = trained(tmp_path, "clip")
    refused(run, run, "is or holds the source")
    refused(run, run / "config.yaml", "config.yaml: is a file")
    refused(tmp_path / "none", tmp_path / "out", "none: no config.yaml")
    model = run / "model"
    unfinished = run / "checkpoints" / "step-00000010"
    unfinished.mkdir(parents=True)
    model.rename(unfinished / "model")
    (run / "checkpoints" / "latest").write_text("step-00000010")
    refused(run, tmp_path / "out", "run: unfinished")
    (unfinished / "model").rename(model)
    other = load_config(tiny.config(tmp_path, model__image_tower=None))
    save_config(other, run / "config.yaml")
    refused(run, tmp_path / "out", "no image tower to export")
    assert not (tmp_path / "out").exists()


def test_an_export_takes_the_place_of_an_earlier_one_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = trained(tmp_path, "clip"), tmp_path / "out"
    arguments = ["export", str(run), str(out)]
    assert main(arguments) == 0
    digests.check(out, read := digests.read_digests(out), "")
    assert read.keys() == {path.name for path in out.iterdir()} - {digests.NAME, MARK, "README.md"}
    modes = {path.stat().st_mode & 0o777 for path in out.iterdir()}
    (tmp_path / "plain").touch()
    assert modes == {(tmp_path / "plain").stat().st_mode & 0o777}
    card = (out / "README.md").read_text()
    # Killed as it removed what it had made aside: its mark is gone first.
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / lock.NAME).touch()
    refused(capsys, arguments, "there is one already; --replace")
    assert not list(tmp_path.glob(".*"))
    arguments.append("--replace")
    (out / "LICENCE").write_text("mine")
    refused(capsys, arguments, "no part of it (LICENCE)")
    (out / "LICENCE").unlink()
    (out / "README.md").write_text(completed := card.replace("language:", "license: mit\nlanguage:"))
    refused(capsys, arguments, "README.md: was changed since it was exported, so --replace leaves it; move it away")
    assert (out / "README.md").read_text() == completed
    (out / "README.md").rename(tmp_path / "README.md")
    assert main(arguments) == 0 == main(arguments)
    assert (out / "README.md").read_text() == card and not list(tmp_path.glob(".*"))
    for break_it in (lambda file: file.write_text("{"), Path.unlink):
        break_it(out / digests.NAME)
        refused(capsys, arguments, f"digests.json is missing or broken; remove {out}, or name another folder")
    # As earlier versions left it.
    (out / MARK).unlink()
    refused(capsys, arguments, "holds files without efficientclip's mark (README.md, config.json, model.safetensors")


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("error:") == 1


def test_a_second_export_to_the_same_folder_leaves_the_first_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real = trained(tmp_path, "clip"), module._processor
    arguments = ["export", str(run), str(tmp_path / "out")]

    def meanwhile(*given: Any) -> Any:
        monkeypatch.undo()
        refused(capsys, arguments, f"process {os.getpid()} on ")
        return real(*given)

    monkeypatch.setattr(module, "_processor", meanwhile)
    assert main(arguments) == 0
    digests.check(tmp_path / "out", digests.read_digests(tmp_path / "out"), "")
    assert (tmp_path / "out" / "model.safetensors").is_file() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("replace", [False, True])
def test_what_comes_while_it_is_written_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, replace: bool
) -> None:
    run, out, real = trained(tmp_path, "clip"), tmp_path / "out", module._processor
    arguments = ["export", str(run), str(out), *(["--replace"] if replace else [])]
    assert not replace or main(arguments) == 0

    def meanwhile(*given: Any) -> Any:
        files(out, {"thesis.txt": b"three years"})
        return real(*given)

    with monkeypatch.context() as patched:
        patched.setattr(module, "_processor", meanwhile)
        refused(capsys, arguments, "(thesis.txt)")
    assert (out / "thesis.txt").read_bytes() == b"three years" and not list(tmp_path.glob(".out*"))
    (out / "thesis.txt").unlink()

    def losing(*given: Any) -> Any:
        (tmp_path / ".out.partial" / "made" / "model.safetensors").unlink()
        return real(*given)

    monkeypatch.setattr(module, "_processor", losing)
    refused(capsys, arguments, "files vanished from it while it was written")
    assert (out / "model.safetensors").is_file() == replace


@pytest.mark.parametrize(("out", "message"), [(".", "without efficientclip's mark"), ("/", "is or holds the source")])
def test_a_folder_without_a_name_of_its_own_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, out: str, message: str
) -> None:
    files(tmp_path, {"here/thesis.txt": b"", "run/config.yaml": b""})
    monkeypatch.chdir(tmp_path / "here")
    refused(capsys, ["export", "../run", out], message)


def test_the_command_says_how_to_open_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path, "clip")
    assert main(["export", str(run), str(tmp_path / "deep" / "out")]) == 0
    assert "deep/out: ChineseCLIPModel.from_pretrained opens it" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
