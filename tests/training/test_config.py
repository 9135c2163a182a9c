"""A configuration: defaults, TOML, flags; each mistake one sentence."""

from pathlib import Path

import pytest

from training.config import Config, changed_fields, configure, parse_config
from training.data.manifest import DataError
from training.zoo import choose

CONFIGS = Path(__file__).parents[2] / "configs"


def test_flags_go_before_the_file_and_the_file_before_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('backbone = "resnet18"\nepochs = 7\n')
    found = configure(path, epochs=3, size=None)
    assert (found.backbone, found.epochs, found.size) == ("resnet18", 3, Config().size)


def test_a_spreadsheet_s_mark_is_no_mistake_and_an_option_is_not_the_file_s(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("epochs = 7\n", encoding="utf-8-sig")
    assert configure(path).epochs == 7
    with pytest.raises(DataError, match=r"the command line: size: .*\(found 8\)"):
        configure(path, size=8)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epocs = 3", "there is no setting epocs; did you mean epochs?"),
        ("zzz = 3", "there is no setting zzz; known are train_on, test_on"),
        ("epochs = 0", "epochs: Input should be greater than or equal to 1 (found 0)"),
        ('size = "large"', "size: Input should be a valid integer"),
        ('imbalance = "some"', "imbalance: Input should be 'none', 'balanced_sampling'"),
        (
            "epochs = 2\nwarmup_epochs = 3.0",
            "warmup_epochs: the learning rate would never be reached in 2 epochs.",
        ),
        ("epochs = 2\nsizes = [32, 48, 64]", "sizes: 3 of them take more than 2 epochs."),
        ("size = 64\nsizes = [32, 96]", "sizes: 96 is larger than size (64)."),
        ('train_on = ["a"]\ntest_on = ["b", "a"]', "test_on: a is in train_on, too."),
        ("epochs = ", "is not TOML"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(DataError) as refused:
        configure(path)
    assert said in str(refused.value)
    assert "recipe.toml" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_changed_is_named() -> None:
    changed = changed_fields(Config(), Config(epochs=3, seed=1))
    assert changed == ["seed 0 -> 1", "epochs 14 -> 3"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_ready_configurations_are_sound(path: Path) -> None:
    config = configure(path)
    (backbone,) = choose([config.backbone])
    assert config.size <= backbone.input_size


def test_the_papers_setting_is_the_papers() -> None:
    paper = configure(CONFIGS / "paper.toml")
    assert (paper.backbone, paper.batch_size) == ("regnet_x_16gf", 32)


@pytest.mark.parametrize(
    "values", [{"learning_rate": float("inf")}, {"weight_decay": float("inf")}, {"train_on": []}]
)
def test_a_recipe_that_cannot_be_followed_is_refused(values: dict[str, object]) -> None:
    (name,) = values
    with pytest.raises(DataError, match=f"a recipe: {name}: "):
        parse_config(values, "a recipe")
