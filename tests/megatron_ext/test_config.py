"""Recipes, YAML files and `section.key=value` words: what is read, what is refused and how."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config import Config
from megatron_ext.config_check import check_config
from megatron_ext.config_file import dump_config, load_config, recipe_names
from megatron_ext.errors import UserError
from megatron_ext.planning.parameters import num_parameters
from megatron_ext.planning.subject import config_model

CORPUS = "data:\n  corpora:\n    - path: corpus\n"


def load(folder: Path, text: str, *overrides: str) -> Config:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(str(path), overrides)


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, text, *overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("section", "key", "text", "value"),
    [
        ("optim", "lr", "3e-4", 3e-4),
        ("optim", "lr", "3.0e-4", 3e-4),
        ("optim", "lr", ".3e-3", 3e-4),
        ("optim", "lr", "1E-3", 1e-3),
        ("optim", "lr", "1", 1.0),
        ("train", "train_iters", "1e3", 1000),
        ("train", "train_iters", "2_000", 2000),
        ("train", "train_iters", "12.0", 12),
        ("train", "global_batch_tokens", "1e6", 1_000_000),
        ("train", "global_batch_tokens", "null", None),
        ("parallel", "sequence_parallel", "yes", True),
        ("log", "run_dir", "'1e3'", "1e3"),
    ],
)
def test_numbers_are_read_as_written(
    tmp_path: Path, section: str, key: str, text: str, value: Any
) -> None:
    from_file = load(tmp_path, f"{CORPUS}{section}:\n  {key}: {text}\n")
    from_word = load(tmp_path, CORPUS, f"{section}.{key}={text}")
    for config in (from_file, from_word):
        found = getattr(getattr(config, section), key)
        assert found == value
        assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "path", "found"),
    [
        ("model: {num_layers: twelve}", "model.num_layers", "valid integer, found 'twelve'"),
        ("model: {num_layers: '12'}", "model.num_layers", "valid integer, found '12'"),
        ("model: {num_layers: 1.5}", "model.num_layers", "valid integer, found 1.5"),
        ("model: {num_layers: true}", "model.num_layers", "valid integer, found True"),
        ("model: {num_layers: 0}", "model.num_layers", "greater than or equal to 1, found 0"),
        ("model: {num_layers: [4]}", "model.num_layers", "valid integer, found [4]"),
        ("model: 3", "model", "expected a section of `key: value` lines, found 3"),
        ("model:", "model", "expected a section of `key: value` lines, found None"),
        ("optim: {lr: .inf}", "optim.lr", "finite number, found inf"),
        ("optim: {lr: .nan}", "optim.lr", "found nan"),
        ("optim: {lr: true}", "optim.lr", "valid number, found True"),
        ("optim: {lr: '3e-4'}", "optim.lr", "valid number, found '3e-4'"),
        (f"optim: {{lr: {'9' * 400}}}", "optim.lr", "valid number, found 999"),
        ("optim: {lr_decay_style: cosin}", "optim.lr_decay_style", "'cosine'"),
        ("parallel: {sequence_parallel: 1}", "parallel.sequence_parallel", "boolean, found 1"),
        ("parallel: {recompute_modules: [mlp, x]}", "parallel.recompute_modules.1", "found 'x'"),
        ("log: {run_dir: 2024-01-01}", "log.run_dir", "found datetime.date(2024, 1, 1)"),
        ("model: {3: 4}", "model.3", "Keys should be strings, found 3"),
    ],
)
def test_wrong_values_name_key_and_finding(
    tmp_path: Path, text: str, path: str, found: str
) -> None:
    message = refusal(tmp_path, f"{CORPUS}{text}\n")
    assert message.startswith(f"{tmp_path / 'run.yaml'}:\n  {path}: ")
    assert found in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {num_layer: 3}", "model.num_layer: unknown key; did you mean 'num_layers'?"),
        ("modle: {num_layers: 3}", "modle: unknown key; did you mean 'model'?"),
        ("optim: {learning: 3}", "optim.learning: unknown key; keys here are optimizer, lr, "),
        (
            "data: {corpora: [{path: x, wieght: 2}]}",
            "data.corpora.0.wieght: unknown key; did you mean 'weight'?",
        ),
        (
            "data: {corpora: [{path: x, prepare: {input: [y], tokeniser: bytes}}]}",
            "data.corpora.0.prepare.tokeniser: unknown key; did you mean 'tokenizer'?",
        ),
    ],
)
def test_misspelt_keys_name_the_nearest(tmp_path: Path, text: str, expected: str) -> None:
    text = text if text.startswith("data") else CORPUS + text
    assert expected in refusal(tmp_path, text)


def test_all_mistakes_are_told_together(tmp_path: Path) -> None:
    text = f"{CORPUS}model: {{num_layers: twelve, hidden_size: -4, num_layer: 1}}\noptim: {{lr: x}}"
    message = refusal(tmp_path, text, "train.seed=-1")
    for key in ("model.num_layers", "model.hidden_size", "model.num_layer", "optim.lr"):
        assert f"\n  {key}: " in message
    assert "\n  train.seed: " in message


def test_data_has_no_default(tmp_path: Path) -> None:
    assert "  data: missing, and it has no default" in refusal(tmp_path, "model: {num_layers: 2}")
    assert "data.corpora: List should have at least 1 item" in refusal(
        tmp_path, "data: {corpora: []}"
    )


def test_overrides_reach_lists_and_absent_sections(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        CORPUS,
        "data.corpora.0.path=other",
        "data.corpora.0.weight=2",
        "optim.lr=3e-4",
        "optim.lr=1e-4",
        "parallel.recompute_modules=[mlp]",
        "checkpoint.load=null",
    )
    assert config.data.corpora[0].path == "other"
    assert config.data.corpora[0].weight == 2.0
    assert config.optim.lr == 1e-4, "the last word counts"
    assert config.parallel.recompute_modules == ["mlp"]
    two = load(tmp_path, CORPUS, "data.corpora=[{path: a}, {path: b, weight: 3}]")
    assert [corpus.path for corpus in two.data.corpora] == ["a", "b"]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("model.num_layers", "an override is section.key=value"),
        ("=3", "an override is section.key=value"),
        ("model.num_layer=3", "model.num_layer: unknown key; did you mean 'num_layers'?"),
        ("model.num_layers.x=3", "model.num_layers: Input should be a valid integer"),
        ("data.corpora.1.path=x", "'1' is not an entry of a list of 1; use 0, or give the whole"),
        ("data.corpora.-1.path=x", "'-1' is not an entry of a list"),
        ("data.corpora.first.path=x", "'first' is not an entry of a list"),
        ("data.corpora.\u00b2.path=x", "is not an entry of a list"),
        ("data.corpora.0.path.x=y", "data.corpora.0.path is a value, not a section"),
        ("data.corpora.0.path.x.y=z", "'x' cannot be set inside a value"),
        ("optim.lr=[", "optim.lr=[: not valid YAML"),
        ("optim.lr=", "optim.lr: Input should be a valid number, found None"),
    ],
)
def test_bad_overrides_are_named(tmp_path: Path, word: str, expected: str) -> None:
    assert expected in refusal(tmp_path, CORPUS, word)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{CORPUS}train:\n  seed: 1\n  seed: 2\n", "key 'seed' stands here twice"),
        (f"{CORPUS}train: &a {{seed: 1}}\noptim: *a\n", "aliases (*name) are not allowed"),
        (f"{CORPUS}<<: {{train: {{seed: 1}}}}\n", "tag:yaml.org,2002:merge"),
        (f"{CORPUS}? [a, b]\n: 3\n", "a key must be a word"),
        (f"{CORPUS}? !!set {{a}}\n: 3\n", "a key must be a word"),
        ("a: !!python/object/apply:os.system ['false']\n", "not valid YAML"),
        ("a: " + "[" * 700, "not valid YAML"),
        ("a: {b: c", "not valid YAML"),
        ("a: \0", "not valid YAML"),
        ("log: {run_dir: 2024-99-01}", "not valid YAML"),
        ("", "expected sections such as `model:`, found NoneType"),
        ("- model\n", "expected sections such as `model:`, found list"),
    ],
    ids=lambda text: text[-24:].strip(),
)
def test_bad_yaml_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    message = refusal(tmp_path, text)
    assert message.startswith(str(tmp_path / "run.yaml"))
    assert expected in message


def test_yaml_errors_name_the_line(tmp_path: Path) -> None:
    assert "line 6, column 3" in refusal(tmp_path, f"{CORPUS}train:\n  seed: 1\n  seed: 2\n")


def test_files_that_cannot_be_a_configuration(tmp_path: Path) -> None:
    huge = tmp_path / "huge.yaml"
    huge.write_text(CORPUS + "#" * (1 << 20))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe model")
    for path, expected in (
        (huge, "larger than a configuration can be (1 MiB)"),
        (binary, "cannot be read as a UTF-8 file"),
        (tmp_path, "cannot be read"),
        (tmp_path / "absent.yaml", "no such file\n  recipes: 125m, "),
    ):
        with pytest.raises(UserError) as caught:
            load_config(f"{path}/" if path.is_dir() else str(path))
        assert str(path) in str(caught.value)
        assert expected in str(caught.value)


def test_unknown_recipe_names_the_nearest_and_all() -> None:
    with pytest.raises(UserError) as caught:
        load_config("quickstrat")
    message = str(caught.value)
    assert "'quickstrat'; did you mean 'quickstart'?" in message
    assert all(name in message for name in recipe_names())


def test_the_recipes_that_were_promised_ship() -> None:
    dense = {"quickstart", "125m", "1b", "7b", "frontier-22b", "frontier-175b", "frontier-1t"}
    sparse = {"moe-quickstart", "deepseek-moe-2b", "deepseek-moe-16b", "mixtral-8x7b", "ling-lite"}
    assert dense | sparse <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_can_run(name: str) -> None:
    config = load_config(name)
    assert config.log.run_dir == f"runs/{name}"
    checked = check_config(config, world_size=config.launch.num_ranks)
    assert checked.train.global_batch_tokens is not None
    assert checked.train.global_batch_tokens % config.data.micro_batch_tokens == 0


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("125m", 0.085),
        ("1b", 1.0),
        ("7b", 6.5),
        ("frontier-22b", 21.7),
        ("frontier-175b", 174.0),
        ("frontier-1t", 1007.0),
    ],
)
def test_recipes_have_the_size_in_their_name(name: str, billions: float) -> None:
    """Without embeddings: 12 * layers * hidden^2 for the shapes of the Frontier paper."""
    model = load_config(name).model
    attention = 2 * (model.num_attention_heads + model.query_groups) * model.head_dim
    layer = model.hidden_size * (attention + 3 * model.ffn_size)
    assert model.num_layers * layer / 1e9 == pytest.approx(billions, rel=0.15)


@pytest.mark.parametrize(
    ("name", "vocab_size", "num_weights"),
    [
        # Published: 2.0 B (a tokenizer of 8K), and the files of the others on Hugging Face.
        ("deepseek-moe-2b", 8192, 1_974_039_040),
        ("deepseek-moe-16b", 102_400, 16_375_728_128),
        ("mixtral-8x7b", 32_000, 46_702_792_704),
        ("ling-lite", 126_464, 16_801_974_272),
    ],
)
def test_recipes_with_experts_have_the_published_sizes(
    name: str, vocab_size: int, num_weights: int
) -> None:
    assert num_parameters(config_model(load_config(name), vocab_size=vocab_size)) == num_weights


@pytest.mark.parametrize("name", recipe_names())
def test_dumped_recipe_loads_as_itself(tmp_path: Path, name: str) -> None:
    config = load_config(name)
    text = dump_config(config)
    assert load(tmp_path, text) == config
    assert set(yaml.safe_load(text)) == set(Config.model_fields), "every section is shown"


texts = st.one_of(
    st.sampled_from(
        ["3e-4", "1e3", "1.5", "12", "yes", "null", "~", "", "2024-01-01", "a: b", "#x"]
    ),
    st.text(max_size=12),
)
positive = st.floats(min_value=1e-30, max_value=1e30)


@settings(max_examples=50)
@given(
    texts=st.tuples(texts, texts, st.none() | texts, st.none() | texts),
    lr=positive,
    epsilon=positive,
    iters=st.integers(1, 10**18),
    flag=st.booleans(),
)
def test_dump_then_load_gives_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    texts: tuple[str, str, str | None, str | None],
    lr: float,
    epsilon: float,
    iters: int,
    flag: bool,
) -> None:
    path, run_dir, load_from, prompt = texts
    config = Config.model_validate(
        {
            "model": {"layernorm_epsilon": epsilon, "qk_layernorm": flag},
            "data": {"corpora": [{"path": path, "weight": lr}]},
            "train": {"train_iters": iters},
            "optim": {"lr": lr},
            "checkpoint": {"load": load_from},
            "log": {"run_dir": run_dir, "sample_prompt": prompt},
        }
    )
    file = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(str(file)) == config


@given(
    text=st.one_of(
        st.text(),
        st.text(alphabet="model:data[]{}&*!?|>-#'\"% \n\t013.e", max_size=60),
        st.text(alphabet="num_layers:truefalse0123456789.e-[]{}, ").map("model: {{{}}}".format),
    ),
    word=st.text(alphabet="model.datcrpr0123=[]{}: ", max_size=30),
)
def test_nothing_but_a_user_error_comes_of_any_text(
    tmp_path_factory: pytest.TempPathFactory, text: str, word: str
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(text, encoding="utf-8", errors="replace")
    for source, overrides in ((str(file), []), ("quickstart", [word])):
        with contextlib.suppress(UserError):
            load_config(source, overrides)
