from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from efficientclip.config import (
    Config,
    MaskedLanguageModelling,
    differing_keys,
    identity_keys,
    load_config,
    save_config,
)
from efficientclip.errors import UserError

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(ROOT.joinpath("configs").glob("*.yaml"))
TINY = {"run": "runs/x", "training": {"pair_visits": 10, "batch_size": 2}}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that holds runs, a store, a file, and links."""
    for name in ("store/inner", "judged", "runs/old"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "alias").symlink_to("store")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_recipes_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    load_config(path)


def refused(file: Path, overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(file, overrides)
    for part in parts:
        assert part in str(caught.value)


BERT = "model.text_tower.architecture={model_type: bert, "


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optimizer.learning_rate=1", ["optimizer.learning_rate", "unknown key", "lr"]),
        ("optimiser.lr=1", ["optimiser", "did you mean `optimizer`?"]),
        ("optimizer.name=adam", ["optimizer.name", "'adamw'", "got 'adam'"]),
        ("optimizer.lr=fast", ["optimizer.lr", "valid number", "got 'fast'"]),
        ("training.batch_size=0", ["training.batch_size", "greater than or equal to 1"]),
        ("model.text_tower.pooling=cls", ["model.text_tower", "exactly one of `pretrained` and `architecture`"]),
        ("batch_size", ["section.key=value"]),
        ("optimizer.lr=.inf", ["optimizer.lr: Input should be a finite number, got inf"]),
        ("optimizer.lr=.nan", ["optimizer.lr: Input should be a finite number, got nan"]),
        ("optimizer.lr=1e400", ["optimizer.lr: Input should be a finite number"]),
        ("optimizer.betas=[0.9, 2]", ["optimizer.betas.1: Input should be less than 1, got 2"]),
        ("optimizer.betas=[-0.1, 0.9]", ["optimizer.betas.0: Input should be greater than or equal to 0"]),
        ("optimizer.betas=[.nan, 0.9]", ["optimizer.betas.0: Input should be a finite number"]),
        ("optimizer.eps=0", ["optimizer.eps: Input should be greater than 0"]),
        ("seed=-1", ["seed: Input should be greater than or equal to 0, got -1"]),
        (f"seed={10**30}", ["seed: Input should be less than or equal to 9223372036854775807"]),
        ("seed=.inf", ["seed: Input should be a finite number"]),
        ("demo_data.noise_seed=-1", ["demo_data.noise_seed: Input should be greater than or equal to 0"]),
        ("objective.direction_weights=[-1, 2]", ["objective.direction_weights.0: Input should be greater than or"]),
        ("objective.direction_weights=[0, 0]", ["objective.direction_weights: both are 0; set one"]),
        ("objective.bank_size=3000000000", ["objective.bank_size: Input should be less than or equal to 2147483647"]),
        ("objective.contrastive_weight=.inf", ["objective.contrastive_weight: Input should be a finite number"]),
        ("training.pair_visits=1e17", ["training.pair_visits: Input should be less than or equal to"]),
        ("training.batch_size=3000000000", ["training.batch_size: Input should be less than or equal to 2147483647"]),
        ("training.micro_batch_size=3", ["training.micro_batch_size: 3 is above batch_size, 2; lower"]),
        ("training.max_caption_tokens=70000", ["training.max_caption_tokens: Input should be less than or equal to"]),
        ("training.grace_seconds=0", ["training.grace_seconds: Input should be greater than 0"]),
        ("training.grace_seconds=1e6", ["training.grace_seconds: Input should be less than or equal to 86400"]),
        ("training.validate_every_steps=0", ["training.validate_every_steps: Input should be greater than or equal"]),
        ("training.report_to=[wanb]", ["training.report_to.0: Input should be", "did you mean `wandb`?"]),
        ("training.report_to=wandb", ["training.report_to: Input should be a valid list, got 'wandb'"]),
        ("training.final=worst", ["training.final", "'best' or 'last'", "got 'worst'"]),
        (
            "training.augmentation.rotation_degrees=181",
            ["training.augmentation.rotation_degrees: Input should be less"],
        ),
        ("training.augmentation.max_zoom_out=11", ["training.augmentation.max_zoom_out: Input should be less than or"]),
        ("confidence.cross_fit_share=11", ["confidence.cross_fit_share: Input should be less than or equal to 10"]),
        ("model.logit_scale=200", ["\n  model.logit_scale: 200 is above logit_scale_max, 100; lower it"]),
        ("model.image_tower={pretrained: a, size: 5000}", ["model.image_tower.size: Input should be less than or"]),
        ("model.image_tower={pretrained: a, std: [1, 0, 1]}", ["model.image_tower.std.1: Input should be greater"]),
        ("model.image_tower={pretrained: ''}", ["model.image_tower.pretrained: empty; give a name"]),
        ("model.image_tower={pretrained: a, revision: ' '}", ["model.image_tower.revision: empty; give a name"]),
        (BERT + "hidden_size: -8}", ["model.text_tower.architecture: hidden_size is -8; give a number from 0"]),
        (BERT + "layer_norm_eps: .nan}", ["model.text_tower.architecture: layer_norm_eps is nan; give a finite"]),
        (BERT + "clip: {num_layers: [1e30]}}", ["architecture: clip.num_layers is 1e+30; give a number from 0"]),
        ("mlm.texts_per_batch=4", ["\n  mlm.texts: not set, though mlm.texts_per_batch is"]),
        ("objective.contrastive_weight=0", ["\n  objective.contrastive_weight: 0, as are", "nothing is learned; set"]),
        ("data.store=''", ["data.store: empty; give a name"]),
        ("data.sources={a: b, c: ''}", ["data.sources.c.path: empty; give a name"]),
        ("data.sources={'': b}", ["data.sources.: empty; give a name"]),
        ("data.sources=[a]", ["data.sources: Input should be a valid dictionary, got ['a']"]),
        ("data.sources={a: {wieght: 2}}", ["data.sources.a.wieght", "did you mean `weight`? Keys here: captions, pa"]),
        ("data.sources={a: {weight: 0}}", ["data.sources.a.weight: Input should be greater than 0, got 0"]),
        ("data.sources={a: {weight: -1}}", ["data.sources.a.weight: Input should be greater than 0, got -1"]),
        ("data.sources={a: {weight: .nan}}", ["data.sources.a.weight: Input should be a finite number"]),
        ("data.sources={a: {weight: 101}}", ["data.sources.a.weight: Input should be less than or equal to 100"]),
        ("data.sources={a: {captions: some}}", ["data.sources.a.captions", "'first', 'random' or 'all', got 'some'"]),
        ("data.sources={a: {captions: all}}", ["data.sources.a.captions: only training.tower=both chooses"]),
        ("data.shards=[a]", ["\n  data.shards: sources have names; write `data.sources: {NAME: PATH}`"]),
        ("data.shards=[]", ["\n  data.shards: sources have names"]),
        ("data.validation={'': a}", ["data.validation.: empty; give a name"]),
        ("data.validation={a: ''}", ["data.validation.a: empty; give a name"]),
        ('mlm.texts="a\\0"', ["mlm.texts: no name that a file could have"]),
        ("deepspeed=" + "x" * 256, ["deepspeed: no name that a file could have"]),
        ('run="\\ud800"', ["invalid Unicode character"]),
        ("seed=" + "1" * 5000, ["not readable as YAML"]),
        ("seed=${seed}", ["not readable as YAML: Recursive interpolation"]),
        ("data.sources=[", ["not readable as YAML"]),
    ],
)
def test_mistakes_name_key_and_remedy(file: Path, override: str, parts: list[str]) -> None:
    refused(file, [override], parts)


def test_sections_that_contradict_each_other(file: Path) -> None:
    without = "objective.contrastive_weight=0"
    refused(file, ["confidence.score=log-probability", without], ["contrastive loss's: set"])
    refused(file, [without, "mlm.texts=t", "mlm.texts_per_batch=4", "mlm.weight=0"], ["nothing is learned"])
    refused(file, ["training.tower=image", "data.verdicts=v.csv"], ["\n  data.verdicts: ", "tower=image reads none"])
    assert load_config(file, [without, "mlm.texts=t", "mlm.texts_per_batch=4"]).mlm.texts_per_batch == 4
    assert load_config(file, [without, "objective.regression_weight=1"]).objective.contrastive_weight == 0


def test_validations_are_by_epochs_or_by_steps(file: Path, tmp_path: Path) -> None:
    by_epochs, by_steps = "training.validate_every=1", "training.validate_every_steps=50"
    refused(file, [by_epochs, by_steps], ["\n  training: set validate_every or validate_every_steps, not both; null"])
    steps = load_config(file, [by_steps])
    save_config(steps, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == steps
    assert load_config(file, [by_epochs, by_steps, "training.validate_every=null"]) == steps
    # Neither rhythm nor trackers change what is learned.
    assert differing_keys(steps, load_config(file, [by_epochs, "training.report_to=[mlflow]"])) == []
    assert [step for step in range(1, 121) if steps.training.validates(step, None)] == [50, 100]
    epochs = load_config(file, ["training.validate_every=2"]).training
    assert [ended for ended in range(1, 6) if epochs.validates(7, ended)] == [2, 4] and not epochs.validates(2, None)
    assert load_config(file).training.validates(7, 1)


def test_threads_beyond_the_cores(file: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    refused(file, [f"training.threads={cores + 1}"], [f"training.threads: {cores + 1}, but", f"may use {cores} core"])
    assert load_config(file, [f"training.threads={cores}"]).training.threads == cores
    assert load_config(file, [f"training.threads={cores + 1}"], saved=True).training.threads == cores + 1


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("seed=0", 0),
        (f"seed={2**63 - 1}", 2**63 - 1),
        ("optimizer.lr=1e30", 1e30),
        ("optimizer.betas=[0, 0.999]", (0, 0.999)),
        ("objective.direction_weights=[0, 1]", (0, 1)),
        ("objective.bank_size=0", 0),
        ("training.pair_visits=9007199254740992", 2**53),
        ("training.micro_batch_size=2", 2),
        ("training.grace_seconds=86400", 86400),
        ("training.final=last", "last"),
        ("model.logit_scale=100", 100),
        ("confidence.cross_fit_share=10", 10),
    ],
)
def test_the_ends_of_the_ranges_are_taken(file: Path, override: str, value: Any) -> None:
    found: Any = load_config(file, [override])
    for part in override.partition("=")[0].split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ("run=''", ["run: empty"]),
        ("run=.", ["run: '.'", "name a folder of its own"]),
        ("run=./", ["name a folder of its own"]),
        ("run=../..", ["name a folder of its own"]),
        ("run=/", ["name a folder of its own"]),
        ("run=file", ["run: ", "/file is a file, where a folder is wanted; remove it"]),
        ("run=file/x", ["/file is a file, where a folder is wanted"]),
        ("run=dangling", ["/dangling is a dangling symbolic link, where"]),
        ("run=dangling/x", ["/dangling is a dangling symbolic link, where"]),
        ("run=store data.store=store", ["run: ", "/store and data.store, ", "overlap; move one elsewhere"]),
        ("run=store/x data.store=store", ["data.store", "overlap"]),
        ("run=runs data.store=runs/store", ["data.store", "overlap"]),
        ("run=alias/x data.store=store", ["data.store", "overlap"]),
        ("run=store/x mlm.texts=alias", ["mlm.texts", "overlap"]),
        ("run=store data.validation.held=store", ["data.validation.held", "overlap"]),
        ("run=store/x data.sources.one=runs data.sources.two=store", ["data.sources.two", "overlap"]),
        ("run=judged/x confidence.cross_fit=judged", ["run: ", "confidence.cross_fit, ", "overlap"]),
        ("run=judged confidence.cross_fit=judged", ["confidence.cross_fit, ", "overlap"]),
        ("run=judged confidence.cross_fit=judged/x", ["confidence.cross_fit, ", "overlap"]),
        ("data.store=store confidence.cross_fit=store/x", ["confidence.cross_fit: ", "data.store, ", "overlap"]),
        ("confidence.cross_fit=file", ["confidence.cross_fit: ", "is a file"]),
        ("run=runs/old model.start_from=runs/old", ["model.start_from: ", "is this run's own folder; give"]),
        (
            "run=runs/old model.image_tower.pretrained=runs/old",
            ["model.image_tower.pretrained: ", "is this run's own folder"],
        ),
    ],
)
def test_folders_that_are_none_of_the_runs(file: Path, folders: Path, overrides: str, parts: list[str]) -> None:
    refused(file, overrides.split(" "), parts)


def test_neighbouring_folders_are_taken(file: Path, folders: Path) -> None:
    given = [
        "run=runs/new",
        "data.store=store",
        "mlm.texts=store/inner",
        "data.validation={held: store, too: runs/held}",
    ]
    given += ["confidence.cross_fit=judged", "model.start_from=runs/old", "model.image_tower.pretrained=runs/old"]
    load_config(file, [*given, "data.sources={tars: runs/tars, one: file}"])
    load_config(file, ["run=runs/old", "model.start_from=runs/old/fold-0"])


def test_urls_stay_as_they_are_and_patterns_of_paths_are_absolute(file: Path, folders: Path, tmp_path: Path) -> None:
    given = ["s3://bucket/{0..3}.tar", "pipe:cat a/../b.tar", "HTTPS://host/a.tar?b=../c", "train/{0..3}.tar"]
    listed = ",".join(f"s{at}: '{one}'" for at, one in enumerate(given))
    overrides = [f"data.sources={{{listed}}}", "data.validation={held: 'https://host//held.tar'}", "data.cache=kept"]
    config = load_config(file, overrides)
    assert [str(one.path) for one in config.data.sources.values()] == [
        *given[:3],
        str(folders / "train" / "{0..3}.tar"),
    ]
    assert str(config.data.validation["held"]) == "https://host//held.tar" and config.data.cache == folders / "kept"
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml", saved=True) == config
    aside = [*overrides, "data.cache=elsewhere", "data.cache_gib=2", "data.max_bad_shards=3"]
    assert differing_keys(config, load_config(file, aside)) == []


def test_paths_are_absolute_and_hub_ids_stay(file: Path, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = "{architecture: {model_type: efficientclip_text, label: store}, pooling: last, clip_layers: store}"
    given = [
        "run=alias/../runs/new", "data.store=store", "data.sources={a: a, b: {path: /b}}", "deepspeed=d",
        "mlm.texts=~/texts", "confidence.cross_fit=judged", "model.start_from=runs/old", f"model.text_tower={tower}",
        "data.validation.held=./c",
        "data.tokenizer=hfl/chinese-roberta", "model.image_tower.pretrained=of/a/run", "model.teacher.mean=e.npy",
    ]  # fmt: skip
    config, model = (found := load_config(file, given)), found.model
    assert config.run == folders / "runs/new" and config.data.store == folders / "store"
    sources = {name: source.path for name, source in config.data.sources.items()}
    assert sources == {"a": folders / "a", "b": Path("/b")} and config.data.validation == {"held": folders / "c"}
    assert config.deepspeed == folders / "d" and config.mlm.texts == Path.home() / "texts"
    assert config.confidence.cross_fit == folders / "judged" and model.start_from == folders / "runs/old"
    assert model.text_tower is not None and model.text_tower.clip_layers == str(folders / "store")
    assert model.text_tower.architecture == {"model_type": "efficientclip_text", "label": "store"}
    assert model.image_tower is not None and model.image_tower.pretrained == str(folders / "of/a/run")
    assert model.teacher is not None and model.teacher.mean == folders / "e.npy"
    assert config.data.tokenizer == "hfl/chinese-roberta"
    assert model.teacher.pretrained == "openai/clip-vit-base-patch32"
    save_config(config, folders / "saved.yaml")
    monkeypatch.chdir("/")
    assert load_config(folders / "saved.yaml") == config


def test_where_things_are_makes_no_other_run(file: Path, folders: Path) -> None:
    one = ["data.store=store", "model.start_from=runs/old", "model.image_tower.pretrained=./here", "data.tokenizer=a/b"]
    two = ["data.store=elsewhere", "model.image_tower.pretrained=./there", "deepspeed=d.json", "data.sources.a=x"]
    two += ["data.verdicts=v.csv"]
    moved = ["run=runs/moved", "data.validation={held: x}", "mlm.texts=y", "confidence.cross_fit=judged", "seed=3"]
    here, there = load_config(file, one), load_config(file, [*two, *moved])
    assert differing_keys(here, there) == ["seed"]
    hub = load_config(file, ["model.image_tower.pretrained=openai/clip"])
    assert differing_keys(here, hub) == ["model.image_tower.pretrained"]
    keys = identity_keys(there)
    assert keys["seed"] == 3 and "training.final" not in keys and keys["optimizer.betas"] == [0.9, 0.95]
    assert not [value for value in keys.values() if "/" in str(value) and "openai" not in str(value)]


def test_names_of_sources_make_no_other_run_and_weights_do(file: Path) -> None:
    both = ["training.tower=both", "objective.bank_size=0"]

    def differing(*sources: str) -> list[str]:
        one, other = (load_config(file, [*both, f"data.sources={given}"]) for given in sources)
        return differing_keys(one, other)

    assert differing("{a: x, b: y}", "{c: z, d: {path: w, weight: 1, captions: random}}") == []
    assert differing("{a: x}", "{a: {path: x, weight: 2}}") == ["data.sources.a.weight"]
    assert differing("{a: {path: x, captions: all}}", "{a: {path: y, captions: first}}") == ["data.sources.a.captions"]
    refused(file, [*both, "data.sources={a: {weight: 2}}"], ["data.sources.a.path: not set; training.tower=both reads"])
    assert load_config(file, ["data.sources={a: {weight: 2}}"]).data.sources["a"].weight == 2


def test_a_saved_config_of_an_earlier_version_names_its_shards(file: Path, folders: Path) -> None:
    config = load_config(file, ["data.sources={shards-0: a, shards-1: b}"])
    save_config(config, folders / "saved.yaml")
    tree = yaml.safe_load((folders / "saved.yaml").read_text())
    del tree["data"]["sources"]
    for shards in (["a", str(folders / "b")], []):
        tree["data"]["shards"] = shards
        (folders / "saved.yaml").write_text(yaml.safe_dump(tree))
        found = load_config(folders / "saved.yaml", saved=True)
        assert list(found.data.sources.values()) == list(config.data.sources.values())[: len(shards)]
        with pytest.raises(UserError, match=r"data\.shards: sources have names"):
            load_config(folders / "saved.yaml")


def test_sections_made_in_code_keep_their_paths() -> None:
    config = Config.model_validate(TINY | {"data": {"store": "a"}})
    assert config.run == Path("runs/x") and config.data.store == Path("a")
    assert MaskedLanguageModelling(texts_per_batch=4).texts is None


def test_unknown_keys_of_architectures() -> None:
    from transformers import ResNetConfig

    from efficientclip.model.towers import architecture

    for description, message in {
        ("bert", "hidden_sise"): "architecture bert: unknown key hidden_sise; did you mean `hidden_size`",
        ("resnet", "depth"): "architecture resnet: unknown key depth; did you mean `depths`",
        ("efficientclip_text", "num_layers"): "unknown key num_layers; did you mean `num_hidden_layers`",
        ("brt", "hidden_size"): "no model_type 'brt'; did you mean `bert`",
        ("bert", "dtype"): "architecture bert: ",
    }.items():
        with pytest.raises(UserError, match=message.replace("?", r"\?")):
            architecture({"model_type": description[0], description[1]: "none"})
    # A config from the hub may hold what this version of Hugging Face does not know.
    saved = ResNetConfig(legacy=1).to_dict()
    assert architecture({**saved, "image_size": 16}).to_dict()["legacy"] == 1
    known = {"vocab_size": 9, "clip": {"hidden_size": 64}, "hidden_size": 64, "num_labels": 3, "dtype": "float32"}
    assert architecture({"model_type": "efficientclip_text"}, **known).vocab_size == 9


TINY_YAML = yaml.safe_dump(TINY).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"run: [", "not readable as YAML"),
        (b"- 1\n- 2", "a list; write it as"),
        (b"5", "not readable: Invalid loaded object type"),
        (TINY_YAML + b"seed: ???", "Missing mandatory value: seed"),
        (b"hello", "hello: unknown key"),
        (b"", "run: Field required"),
        (bytes(range(256)), "not readable as YAML"),
        (b"\0", "not readable as YAML"),
        (TINY_YAML + b"seed: 1\nseed: 2", "found duplicate key seed"),
        (TINY_YAML + b"1: 2", "1: Keys should be strings"),
        (TINY_YAML + b"null: 2", "Incompatible key type"),
        (TINY_YAML + b"? [1, 2]\n: 2", "found unhashable key"),
        (TINY_YAML + b"data: {validation: {1: a}}", "data.validation.1: Input should be a valid string"),
        (TINY_YAML + b"seed: ${demo_data.noise_seed}\ndemo_data: {noise_seed: '${seed}'}", "Recursive interpolation"),
        (TINY_YAML + b"data: &x {store: *x}", "recursive aliases"),
        (TINY_YAML + b"data: " + b"[" * 3000 + b"]" * 3000, "not readable as YAML"),
        (TINY_YAML + b"data: null", "data: Input should be a valid dictionary"),
        (TINY_YAML + b"seed: !!python/object:os.system 1", "not readable as YAML"),
        (TINY_YAML + b"---\nseed: 1", "expected a single document"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "odd.yaml").write_bytes(content)
    refused(tmp_path / "odd.yaml", [], [f"config {tmp_path / 'odd.yaml'}:", message])


def test_what_is_no_file(tmp_path: Path, file: Path) -> None:
    refused(tmp_path / "none.yaml", [], ["no such file"])
    refused(tmp_path, [], ["no such file, but a folder; give a YAML file"])
    refused(file / "x", [], ["no such file"])
    if os.getuid() != 0:
        file.chmod(0)
        refused(file, [], ["not readable: Permission denied"])


def test_overrides_and_saved_config_round_trip(file: Path, tmp_path: Path) -> None:
    config = load_config(file, ["optimizer.lr=0.5", "data.validation={a: b}", "training.micro_batch_size=1"])
    assert config.optimizer.lr == 0.5 and config.data.validation == {"a": Path.cwd() / "b"}
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
