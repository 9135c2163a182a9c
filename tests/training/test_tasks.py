from dataclasses import replace

import pytest
import torch

from models.bundle import OPTIONAL_TASKS, REQUIRED_TASKS
from training import export
from training.data.manifest import Record
from training.data.vocabulary import Diagnosis, Sex, Site
from training.network import ServedNetwork
from training.tasks import MISSING, TASKS, encode_targets, untaught, without_untaught


def test_labels_are_encoded_in_the_order_of_the_vocabularies() -> None:
    known = Record(
        "a",
        "",
        "d",
        melanoma=True,
        diagnosis=Diagnosis.MEL,
        age=47.0,
        sex=Sex.MALE,
        site=Site.TORSO,
    )
    # The network has no class for a squamous cell carcinoma.
    other = Record("b", "", "d", diagnosis=Diagnosis.SCC)
    found = encode_targets([known, other]).classes
    assert {name: values.tolist() for name, values in found.items()} == {
        "melanoma": [1, MISSING],
        "age": [9, MISSING],  # 45, on the 5-year grid
        "site": [3, MISSING],
        "sex": [1, MISSING],
        "diagnosis": [4, MISSING],
    }


def test_a_head_has_the_outputs_of_its_kind() -> None:
    outputs = {task.name: task.outputs for task in TASKS}
    assert outputs == {"melanoma": 1, "diagnosis": 7, "age": 18, "site": 6, "sex": 2}


def test_every_head_is_exported_and_answered() -> None:
    """A head that is trained and not served would be trained for nothing."""
    trained = {task.name: task.classes for task in TASKS}
    exported = {task.name: len(task.labels) for task in export.TASKS}
    # Of age, bins are exported, not the grid that is learned.
    assert exported | {"age": trained["age"]} == trained
    assert set(trained) == REQUIRED_TASKS | OPTIONAL_TASKS
    of_heads = {*trained, "melanoma_logit", "melanoma_map", "age_years"} - {"melanoma"}
    assert {*of_heads, "ood_score"} == set(ServedNetwork.OUTPUTS)


def test_no_records_have_no_targets() -> None:
    assert all(len(values) == 0 for values in encode_targets([]).classes.values())


@pytest.mark.parametrize(("age", "place"), [(0, 0), (44.9, 8), (45, 9), (50, 10), (120, 18)])
def test_an_age_is_that_of_the_grid_at_or_below_it(age: float, place: int) -> None:
    (found,) = encode_targets([Record("a", "", "d", age=age)]).classes["age"].tolist()
    assert found == place


def test_a_task_is_untaught_where_no_images_have_labels_to_tell_apart() -> None:
    records = [
        Record("a", "", "d", melanoma=True, age=30.0, sex=Sex.MALE),
        Record("b", "", "d", melanoma=False, diagnosis=Diagnosis.SCC),  # which is no class
        Record("c", "", "d", age=40.0, sex=Sex.MALE),
    ]
    assert untaught(records) == ["diagnosis", "site", "sex"]


@pytest.mark.parametrize(
    ("known", "told_apart"),
    [
        ([], False),
        ([Diagnosis.MEL], False),  # folders `melanoma` and `benign`
        ([Diagnosis.NV, Diagnosis.BCC], False),
        ([Diagnosis.NV, Diagnosis.MEL], True),
    ],
)
def test_a_diagnosis_that_says_the_same_of_melanoma_everywhere_is_untaught(
    known: list[Diagnosis], told_apart: bool
) -> None:
    records = [Record(str(n), "", "d", diagnosis=each) for n, each in enumerate(known)]
    assert ("diagnosis" not in untaught([*records, Record("none", "", "d")])) is told_apart


def test_labels_that_teach_nothing_are_left_to_teachers_where_there_are_any() -> None:
    records = [
        Record("a", "", "d", melanoma=True, diagnosis=Diagnosis.MEL, sex=Sex.MALE),
        Record("b", "", "d", melanoma=False, sex=Sex.FEMALE),
        Record("c", "", "d", melanoma=False, diagnosis=Diagnosis.NV, age=40.0),  # validates
    ]
    encoded = encode_targets(records)
    found, left_out = without_untaught(encoded, records, [0, 1])
    assert left_out == {"age", "site", "diagnosis"}
    assert found.classes["diagnosis"].tolist() == [MISSING] * 3
    assert found.classes["melanoma"].tolist() == [1, 0, 0]
    taught = replace(encoded, soft={"diagnosis": torch.full((3, 7), 1 / 7)})
    found, left_out = without_untaught(taught, records, [0, 1])
    assert left_out == {"age", "site"}
    assert found.classes["diagnosis"].tolist() == [MISSING, MISSING, 5]
    assert encoded.classes["diagnosis"].tolist() == [4, MISSING, 5]
