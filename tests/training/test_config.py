"""A configuration: defaults, TOML, flags; each mistake one sentence."""

from pathlib import Path

import pytest
from pydantic import ValidationError

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


def test_a_recipe_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nope\.toml cannot be read: No such file"):
        configure(tmp_path / "nope.toml")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        configure(tmp_path)


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
        ('folds = 2\nstart_from = "runs/a"', "start_from: with folds, the other run has learned"),
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


# What is refused, and what is just taken.
BOUNDS = {
    "mixing_concentration": ([0, float("inf")], [1e-9]),
    "seed": ([-1, 2**32], [0, 2**32 - 1]),
    "size": ([31, 1025], [32, 1024]),
    "sizes": ([(31,)], [(32,)]),
    "folds": ([0, 101], [1, 100]),
    "epochs": ([0], [1]),
    "batch_size": ([1], [2]),
    "accumulate": ([0], [1]),
    "learning_rate": ([0, float("inf")], [1e-9]),
    "backbone_rate": ([0], [1e-9]),
    "first_layer_rate": ([0, 1.01], [1e-9, 1]),
    "weight_decay": ([-1e-9, float("inf")], [0]),
    "warmup_epochs": ([-1e-9, 14.01], [0, 14]),
    "frozen_epochs": ([-1], [0]),
    "patience": ([0], [1]),
    "ema_decay": ([-1e-9, 1], [0, 0.999]),
    "trunk_channels": ([0], [1]),
    "drop_path": ([-1e-9, 1], [0, 0.999]),
    "distillation": ([-1e-9, 1.01], [0, 1]),
    "train_on": ([()], [("a",)]),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_a_recipe_that_cannot_be_followed_is_refused(name: str) -> None:
    refused, taken = BOUNDS[name]
    for value in refused:
        with pytest.raises(DataError, match=f"a recipe: {name}"):
            parse_config({name: value}, "a recipe")
    for value in taken:
        assert getattr(parse_config({name: value}, "a recipe"), name) == value


def test_a_training_that_is_under_way_keeps_its_recipe() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Config().epochs = 3  # type: ignore[misc]


def test_images_grow_in_equal_steps() -> None:
    assert Config(epochs=2, size=64).training_size(1) == 64
    growing = Config(epochs=5, warmup_epochs=0, size=64, sizes=(32, 48, 64))
    assert [growing.training_size(epoch) for epoch in range(6)] == [32, 32, 48, 48, 64, 64]
