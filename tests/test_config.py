"""Configuration: overlays, overrides, and one clear sentence for every mistake."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cvrunner.config.reading import load_config, parse_override
from cvrunner.config.schema import RENAMED_KEYS, Config, digest, merge, valid_keys, validate
from cvrunner.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "configs"


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_every_config_of_the_repository_is_valid(path: Path) -> None:
    config = load_config(path)
    assert next(iter(config.conditions)) == "frozen"
    frozen, *_, unfrozen = (config.for_condition(name) for name in config.conditions)
    assert frozen.model.freeze_speech_encoder
    assert not unfrozen.model.freeze_speech_encoder
    assert frozen.train.effective_batch == unfrozen.train.effective_batch


def test_finetune_has_the_values_of_the_script_it_replaces() -> None:
    config = load_config(CONFIGS / "finetune.yaml")
    train = config.train
    assert (train.batch_size, train.accumulation_steps, train.effective_batch) == (4, 2, 8)
    assert (train.lr, train.encoder_lr, train.epochs) == (1e-4, 1e-5, 20)
    assert not config.model.freeze_speech_encoder
    assert config.model.encoder == "microsoft/wavlm-large"


def test_the_ladder_is_finetune_with_four_ways_to_adapt_the_encoder() -> None:
    ladder, finetune = (load_config(CONFIGS / f"{name}.yaml") for name in ("ladder", "finetune"))
    methods = {name: ladder.for_condition(name).adaptation.method for name in ladder.conditions}
    assert methods == {"frozen": "frozen", "lora": "lora", "top-layers": "top_layers", "full": "full"}
    assert (ladder.model, ladder.train) == (finetune.model, finetune.train)


def test_finetune_full_differs_from_finetune_in_epochs_and_forecasts_alone() -> None:
    quick, full = (load_config(CONFIGS / f"{name}.yaml").model_dump() for name in ("finetune", "finetune_full"))
    assert full["train"].pop("epochs") == 50
    assert quick["train"].pop("epochs") == 20
    forecasts = {c["quantity"]: (c["low"], c["high"]) for c in full.pop("reference")["claims"] if "50" in c["name"]}
    assert forecasts == {"ccc_valence": (0.64, 0.68), "ccc_arousal": (0.68, 0.70), "ccc_avg": (0.66, 0.69)}
    quick.pop("reference")
    assert full == quick


def test_the_defaults_keep_the_old_meaning_of_freezing() -> None:
    assert validate({}, "test").model.freeze_speech_encoder is True


def test_an_overlay_changes_what_it_names_and_overrides_come_last(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("train: {lr: 0.1, epochs: 7}\ncluster: {retries: {worker_died: 5}}\n")
    config = load(tmp_path, "base: base.yaml\ntrain: {lr: 0.2}\n", "train.epochs=9", "model.layers=[1, 2]")
    assert (config.train.lr, config.train.epochs, config.cluster.retries.worker_died) == (0.2, 9, 5)
    assert config.model.layers == (1, 2)


def test_an_overlay_that_names_conditions_replaces_them_all_and_an_override_adds_to_them(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("conditions: {a: {}, b: {train: {lr: 0.1}}}\n")
    assert list(load(tmp_path, "base: base.yaml\nconditions: {c: {}}\n").conditions) == ["c"]
    config = load(tmp_path, "base: base.yaml\n", "conditions.b.train.epochs=3")
    assert config.conditions == {"a": {}, "b": {"train": {"lr": 0.1, "epochs": 3}}}


def test_a_condition_overrides_the_rest(tmp_path: Path) -> None:
    config = load(tmp_path, "train: {lr: 0.2}\nconditions:\n  slow: {train: {lr: 0.1}}\n  fast: {}\n")
    assert config.for_condition("slow").train.lr == 0.1
    assert config.for_condition("fast").train.lr == 0.2


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", "1e-04"])
def test_numbers_with_exponents_are_numbers(tmp_path: Path, text: str) -> None:
    """YAML 1.1 reads 1e-4 as a string, and so did the loader of the original script."""
    assert load(tmp_path, f"train: {{lr: {text}}}").train.lr == 1e-4
    assert load(tmp_path, "", f"train.lr={text}").train.lr == 1e-4


MISTAKES = {
    "train: {epoch: 3}": "train.epoch: unknown key in .*did you mean train.epochs?",
    "trian: {epochs: 3}": "trian: unknown key in .*did you mean train?",
    "model: {lr: 0.1}": "model.lr: unknown key in .*did you mean train.lr?",
    "model: {mamba: {chunksize: 8}}": "model.mamba.chunksize: unknown key .*did you mean model.mamba.chunk_size?",
    "train: {lr: fast}": "train.lr: .*valid number, not 'fast'",
    "train: {lr: -1}": "train.lr: .*greater than 0, not -1",
    "train: {lr: .nan}": "train.lr: .*finite number",
    "train: {epochs: 2.5}": "train.epochs: .*valid integer",
    "train: {epochs: '20'}": "train.epochs: .*valid integer, not '20'",
    "train: {seeds: []}": "train.seeds: must name one or more",
    "train: {epochs: 2, freeze_epochs: 2}": "train: freeze_epochs 2 must be below epochs 2",
    "model: {freeze_speech_encoder: maybe}": "model.freeze_speech_encoder: .*valid boolean, not 'maybe'",
    "model: {frame_rate_hz: 20}": "model.frame_rate_hz: must be 50, 25 or 12.5, not 20",
    "model: {protocol: session}": "model.protocol: .*'utterance' or 'dialogue', not 'session'",
    "model: {layers: [1, 1]}": "model.layers: must name one or more, each once",
    "model: {width: 30}": "model: mamba.head_dim 32 must divide",
    "corpus: {format: cremad}": "corpus.format: .*'iemocap', .* or 'demo', not 'cremad'",
    "corpus: {scale: [5, 1]}": "corpus: scale must go from low to high",
    "conditions: {}": "conditions must name one condition or more",
    "conditions: {Big: {}}": "conditions.Big",
    "conditions: {linear_probe: {}}": "conditions.linear_probe: every run has a linear probe of this name",
    "conditions: {a: {cluster: {}}}": "conditions.a.cluster: a condition may change only model and train",
    "conditions: {a: {train: {lr: -1}}}": "train.lr: input should be greater than 0, not -1 .conditions\\.a",
    "conditions: {a: {}, b: {model: {freeze: true}}}": "model.freeze: unknown key in conditions.b; did you mean",
    "folds: {scheme: manifest_split}": "folds.scheme manifest_split needs corpus.format manifest",
    "model: {protocol: dialogue}\ntrain: {accumulation: averaged}": "train.accumulation averaged cannot be used",
    "verdict: {primary: dominance}": "verdict.primary dominance: is not predicted, choose one of valence, arousal, avg",
    "verdict: {margin: 0}": "verdict.margin: .*greater than 0, not 0",
    "verdict: {cluster: session}": "verdict.cluster: .*'dialogue' or 'speaker', not 'session'",
    "train: {lr: 1}\ntrain: {lr: 2}": "line 2: duplicate key 'train'",
    "train: {lr: 1, lr: 2}": "duplicate key 'lr'",
    "train: [1, 2": "line 1",
    "- a\n- b": "must hold sections with keys, not list",
    "base: 3": "base must be a file name, not 3",
    "base: nowhere.yaml": "nowhere.yaml: cannot be read: No such file",
    "base: config.yaml": "base files form a circle",
    "train: !!python/object/apply:os.system ['true']": "could not determine a constructor",
    "? [a, b]\n: 1": "a key must be a word",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_one_clear_sentence(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){MISTAKES[text].replace('?', '[?]')}"):
        load(tmp_path, text)


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, "train: {lr: -1, epochs: 0}\nmodel: {widht: 3}")
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize("old", RENAMED_KEYS)
def test_a_renamed_key_is_refused_with_its_new_name_wherever_it_is_set(tmp_path: Path, old: str) -> None:
    new = RENAMED_KEYS[old]
    assert new in valid_keys()
    assert old not in valid_keys()
    section, _, last = old.rpartition(".")
    inside = f"{{{section.partition('.')[2] or last}: {{{last}: 1}}}}" if "retries" in old else f"{{{last}: 1}}"
    text = f"{section.partition('.')[0]}: {inside}\n"
    (tmp_path / "base.yaml").write_text(text)
    for file in (text, "base: base.yaml\n"):
        with pytest.raises(ConfigError) as error:
            load(tmp_path, file)
        assert re.fullmatch(rf"{re.escape(old)} \(.*config\.yaml.*\): renamed to {re.escape(new)}", str(error.value))
    with pytest.raises(ConfigError) as error:
        load(tmp_path, "", f"{old}=1")
    assert str(error.value) == f"{old} (override {old}=1): renamed to {new}"


def test_a_renamed_key_in_a_condition_or_a_search_space_is_refused_with_its_new_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, "conditions: {a: {}, b: {train: {warmup: 0.2}}}")
    assert str(error.value) == "train.warmup (conditions.b): renamed to train.warmup_ratio"
    with pytest.raises(ConfigError) as error:
        load(tmp_path, "", "conditions.unfrozen.model.unfreeze_layers=2")
    assert str(error.value) == "model.unfreeze_layers (conditions.unfrozen): renamed to model.unfreeze_top_layers"
    with pytest.raises(ConfigError) as error:
        load(tmp_path, "tune: {search_space: {model.unfreeze_layers: {choices: [1, 2]}}}")
    key = "tune.search_space.model.unfreeze_layers"
    assert str(error.value) == f"{key} ({tmp_path / 'config.yaml'}): renamed to model.unfreeze_top_layers"


@pytest.mark.parametrize("override", ["train.lr", "=3", "train..lr=3", "train.lr =3", "train.lr=[1"])
def test_a_malformed_override_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        load(tmp_path, "", override)


def test_files_that_are_not_utf8_or_are_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("# é\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "latin.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


def test_a_byte_order_mark_and_an_empty_file_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xef\xbb\xbftrain: {epochs: 4}\n")
    assert load_config(path).train.epochs == 4
    path.write_bytes(b"")
    assert load_config(path) == validate({}, "test")


def test_a_dumped_config_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(CONFIGS / "finetune.yaml", ["model.layers=[3, 5]", "train.early_stopping_patience=4"])
    path = tmp_path / "copy.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(path) == config


def test_every_key_of_the_old_script_exists() -> None:
    keys = {key.rpartition(".")[2] for key in valid_keys()}
    assert {
        "freeze_speech_encoder",
        "batch_size",
        "accumulation_steps",
        "encoder_lr",
        "lr",
        "epochs",
        "grad_clip",
    } <= keys


def test_places_and_the_cluster_do_not_change_the_numbers_and_settings_do() -> None:
    plain = validate({}, "test").numerics
    for same in ({"corpus": {"root": "/x"}}, {"results": {"root": "/x"}}, {"tracking": {"enabled": False}}):
        assert validate(same, "test").numerics == plain
    for other in ({"train": {"lr": 1}}, {"model": {"width": 64}}, {"corpus": {"labels": "observers"}}):
        assert validate(other, "test").numerics != plain


NESTED = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc._", max_size=4), inner, max_size=3),
    max_leaves=8,
)
SECTIONS = st.sampled_from([*valid_keys(), "x", ""]).map(lambda key: key.partition(".")[0])


@given(st.dictionaries(SECTIONS, NESTED, max_size=3))
def test_whatever_is_in_a_config_it_is_valid_or_a_config_error(data: dict[str, Any]) -> None:
    with contextlib.suppress(ConfigError):
        validate(data, "fuzz")


@given(st.text(max_size=40))
def test_whatever_an_override_says_it_is_a_mapping_or_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert isinstance(parse_override(text), dict)


MAPPINGS = st.dictionaries(
    st.sampled_from("abc"), st.integers() | st.dictionaries(st.sampled_from("xy"), st.integers())
)


@given(MAPPINGS, MAPPINGS)
def test_merging_lets_the_upper_one_win_and_changes_neither(below: dict[str, Any], above: dict[str, Any]) -> None:
    before = digest([below, above])
    merged = merge(below, above)
    assert digest([below, above]) == before
    assert set(merged) == {*below, *above}
    assert merge(merged, above) == merged


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            "{train.encodr_lr: {low: 1e-5, high: 1e-4}}",
            r"tune\.search_space\.train\.encodr_lr: .*mean train\.encoder_lr",
        ),
        ("{corpus.scale: {choices: [[1, 5]]}}", r"tune\.search_space\.corpus\.scale: no key of model or train"),
        ("{model.mamba: {choices: [1]}}", r"tune\.search_space\.model\.mamba: no key of model or train"),
        ("{train.seeds: {choices: [[1]]}}", r"tune\.search_space\.train\.seeds: is averaged over"),
        ("{train.batch_size: {low: 1, high: 8}}", r"tune\.search_space\.train\.batch_size: .*valid integer"),
        ("{train.grad_clip: {choices: [0.3, -1]}}", r"tune\.search_space\.train\.grad_clip: .*greater than 0, not -1"),
        ("{train.grad_clip: {choices: []}}", r"tune\.search_space\.train\.grad_clip: choices must name one"),
        (
            "{train.lr: {low: 1e-3, high: 1e-4}}",
            r"tune\.search_space\.train\.lr: low 0\.001 must be below high 0\.0001",
        ),
        ("{train.lr: {low: 0, high: 1, scale: log}}", r"tune\.search_space\.train\.lr: scale log needs low above 0"),
        (
            "{train.lr: {low: 1e-4, high: 1e-3, scale: lin}}",
            r"tune\.search_space\.train\.lr\.scale: .*'linear' or 'log'",
        ),
        ("{train.lr: {lo: 1e-4, high: 1e-3}}", r"tune\.search_space\.train\.lr\.lo: unknown key"),
        ("{}", r"tune: search_space must name one key"),
    ],
)
def test_what_a_sweep_cannot_search_is_an_error_that_names_the_key(tmp_path: Path, space: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, f"tune: {{search_space: {space}}}\n")


def test_naming_a_space_replaces_the_default_one(tmp_path: Path) -> None:
    assert list(load(tmp_path, "tune: {search_space: {model.layers: {choices: [all, [0, 1]]}}}").tune.search_space) == [
        "model.layers"
    ]


def test_a_condition_may_have_settings_per_fold() -> None:
    folds = {1: {"train": {"lr": 0.2}}, "2": {"model": {"dropout": 0.3}}}
    config = validate({"conditions": {"a": {"train": {"lr": 0.1}, "folds": folds}}}, "test")
    assert config.folds_of("a") == [1, 2]
    resolved = {fold: config.for_condition("a", fold) for fold in (None, 1, 2, 3)}
    assert {fold: c.train.lr for fold, c in resolved.items()} == {None: 0.1, 1: 0.2, 2: 0.1, 3: 0.1}
    assert resolved[2].model.dropout == 0.3
    assert validate(config.model_dump(mode="json"), "again") == config


@pytest.mark.parametrize(
    ("folds", "message"),
    [
        ({"0": {}}, r"conditions\.a\.folds\.0: a fold is named by its number, from 1"),
        ({"1": {"train": {"seeds": [1]}}}, r"folds\.1\.train\.seeds: must be the same in all folds of a condition"),
        ({"1": {"corpus": {}}}, r"folds\.1: a fold may change only model and train"),
        ({"1": {"train": {"lr": -1}}}, r"train\.lr: .*greater than 0, not -1 \(conditions\.a\.folds\.1\)"),
        ({"1": {"train": 3}}, r"train: must be a section with keys, not 3 \(conditions\.a\.folds\.1\)"),
        (3, r"conditions\.a\.folds: must be overrides by fold, not 3"),
    ],
)
def test_settings_per_fold_that_break_a_rule_are_named(folds: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate({"conditions": {"a": {"folds": folds}}}, "test")


def test_the_origin_of_settings_changes_no_number() -> None:
    origin = {"source": "tune", "sweep": "demo-tune-1", "samples_per_condition": {"frozen": 12, "unfrozen": 6}}
    config = validate({"settings_from": origin}, "test")
    assert [config.settings_from.samples(c) for c in ("frozen", "unfrozen", "lora")] == [12, 6, 0]
    assert config.numerics == validate({}, "test").numerics


# --- conditions and overrides -----------------------------------------------------------------------------------------


def refused(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text, *overrides)
    return str(error.value)


@pytest.mark.parametrize("section", ["corpus: {root: x}", "cluster: {}", "tune: {}"])
def test_a_condition_may_not_change_what_is_compared(tmp_path: Path, section: str) -> None:
    found = refused(tmp_path, f"conditions: {{a: {{}}, b: {{{section}}}}}")
    assert f"conditions.b.{section.partition(':')[0]}: a condition may change only model and train" in found


def test_a_condition_may_not_have_seeds_of_its_own(tmp_path: Path) -> None:
    rule = "all conditions have the same seeds, so that they can be paired; set train.seeds"
    path = tmp_path / "config.yaml"
    found = refused(tmp_path, "conditions: {a: {}, b: {train: {seeds: [1], lr: 0.1}}}")
    assert found == f"conditions.b.train.seeds ({path}): {rule}"
    override = "conditions.unfrozen.train.seeds=[1, 2]"
    assert refused(tmp_path, "", override) == f"conditions.unfrozen.train.seeds ({path} with {override}): {rule}"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("unfrozn", "did you mean unfrozen?"), ("Frozen", "did you mean frozen?"), ("x", "there are frozen, unfrozen;")],
)
def test_an_override_cannot_add_a_condition(tmp_path: Path, name: str, hint: str) -> None:
    override = f"conditions.{name}.train.lr=0.1"
    rule = "no such condition, and an override cannot add one"
    for text in ("", "conditions: {frozen: {}, unfrozen: {model: {freeze_speech_encoder: false}}}"):
        assert (
            refused(tmp_path, text, override)
            == f"conditions.{name} (override {override}): {rule}; {hint} Add it to the file"
        )


def test_an_override_of_a_condition_keeps_the_others_that_the_file_does_not_name(tmp_path: Path) -> None:
    assert load(tmp_path, "", "conditions.unfrozen.train.lr=0.1").conditions == {
        "frozen": {"model": {"freeze_speech_encoder": True}},
        "unfrozen": {"model": {"freeze_speech_encoder": False}, "train": {"lr": 0.1}},
    }


def test_the_section_as_a_whole_replaces_the_conditions(tmp_path: Path) -> None:
    assert list(load(tmp_path, "", "conditions={a: {}, b: {train: {lr: 0.1}}}").conditions) == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("conditions: {a: {}, b: {}}", ()),
        ("conditions: {a: {train: {lr: 0.1}}, b: {train: {lr: 1e-1}}}", ()),
        ("conditions: {a: {}, b: {model: {freeze_speech_encoder: true}}}", ()),
        ("train: {lr: 0.2}\nconditions: {a: {}, b: {train: {lr: 0.2}}}", ()),
        ("conditions: {a: {}, b: {train: {lr: 0.2}}}", ("train.lr=0.2",)),
        ("conditions: {a: {}, b: {train: {lr: 0.2}}}", ("conditions.a.train.lr=0.2",)),
    ],
)
def test_two_conditions_with_the_same_settings_are_refused(
    tmp_path: Path, text: str, overrides: tuple[str, ...]
) -> None:
    found = refused(tmp_path, text, *overrides)
    assert found.startswith("conditions.b (")
    assert all(override in found for override in overrides)
    assert found.endswith("has the same settings as conditions.a, so there is nothing to compare; change or remove one")


@pytest.mark.parametrize("value", ["/data/a #1", "x # y", " #x", "[1, 2] # three"])
def test_a_value_that_yaml_would_cut_at_a_comment_is_refused(tmp_path: Path, value: str) -> None:
    assert "would be dropped as a comment; quote it: corpus.root='\"...\"'" in refused(
        tmp_path, "", f"corpus.root={value}"
    )


@pytest.mark.parametrize(("value", "root"), [('"/data/a #1"', "/data/a #1"), ("'x # y'", "x # y"), ("a#b", "a#b")])
def test_a_hash_in_quotes_or_within_a_word_is_kept(tmp_path: Path, value: str, root: str) -> None:
    assert load(tmp_path, "", f"corpus.root={value}").corpus.root == root


@pytest.mark.parametrize("number", ["1_0", "010", "0x10", "0b11", "1:30", "1_0.5"])
def test_a_number_is_in_plain_decimal_notation(tmp_path: Path, number: str) -> None:
    assert f"not '{number}'" in refused(tmp_path, f"train: {{epochs: {number}}}")
    assert f"not '{number}'" in refused(tmp_path, "", f"train.epochs={number}")


def test_the_label_variant_of_a_manifest_is_its_own() -> None:
    assert validate({"corpus": {"labels": "observers"}}, "test").label_variant == "observers"
    assert validate({"corpus": {"format": "manifest", "labels": "observers"}}, "test").label_variant == "manifest"


def test_a_tracking_address_with_a_password_is_refused_without_showing_it() -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri: holds a user name or password") as refused:
        validate({"tracking": {"uri": "postgresql://me:secret@host/mlflow"}}, "test")
    assert "secret" not in str(refused.value)
