"""What must stay together."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from training.data.components import components, names_of, shared, with_components
from training.data.layouts import gather, read_datasets
from training.data.manifest import Record
from training.data.vocabulary import Split


def isic(number: int) -> str:
    return f"ISIC_{number:07d}"


def test_records_are_joined_by_image_across_datasets_and_by_lesion_and_patient() -> None:
    records = [
        Record(isic(1), "", "A", lesion="HAM_0000001"),
        Record(isic(2), "", "A", lesion="HAM_0000001"),
        Record(isic(2), "", "B", lesion="IL_0000009"),
        Record(isic(3), "", "B", lesion="IL_0000009"),
        Record(isic(4), "", "B", patient="IP_0000004"),
        Record(isic(5), "", "C", patient="IP_0000004"),
    ]
    assert components(records).tolist() == [0, 0, 0, 0, 1, 1]
    assert len(set(components(records, by=("image", "lesion")).tolist())) == 3
    assert names_of(records, components(records)) == [isic(1)] * 4 + [isic(4)] * 2


def test_a_bare_id_means_something_within_its_dataset_only() -> None:
    records = [
        Record("a", "", "A", lesion="17"),
        Record("a", "", "B", lesion="18"),
        Record("b", "", "B", lesion="17"),
        Record("c", "", "B", lesion="17"),
    ]
    first, second, third, fourth = components(records).tolist()
    assert len({first, second, third}) == 3
    assert third == fourth


def test_ids_of_one_clinic_can_be_said_to_mean_the_same() -> None:
    records = [Record("a", "", "train", patient="17"), Record("b", "", "test", patient="17")]
    assert len(set(components(records).tolist())) == 2
    assert len(set(components(records, same_ids=True).tolist())) == 1
    # A prefix of anybody's is not the archive's; the archive's is, in any case.
    records = [Record("a", "", "A", lesion="lesion_1"), Record("b", "", "B", lesion="lesion_1")]
    assert len(set(components(records).tolist())) == 2
    records = [Record("a", "", "A", patient="IP_1"), Record("b", "", "B", patient="ip_1")]
    assert len(set(components(records).tolist())) == 1


def test_equal_names_of_two_datasets_are_two_components() -> None:
    records = [Record("a", "", "A"), Record("a", "", "B"), Record("isic_0000001", "", "C")]
    assert names_of(records, components(records)) == ["A/a", "B/a", "ISIC_0000001"]


def test_ids_join_what_a_manifest_parts_and_else_its_components_stay() -> None:
    parted = [
        Record("a", "", "A", lesion="1", split=Split.TRAIN, component="a"),
        Record("b", "", "A", lesion="1", split=Split.TEST, component="b"),
        Record("c", "", "A", lesion="2", split=Split.TEST, component="c"),
        Record("d", "", "A", lesion="3", split=Split.VALIDATION, component="c"),
    ]
    found = [record.component for record in with_components(parted)]
    assert found == ["A/a", "A/a", "A/c", "A/c"]
    assert shared(parted, Split.TEST, [Split.TRAIN]) == 1
    assert shared(parted, Split.TEST, [Split.TRAIN, Split.VALIDATION]) == 2
    assert shared(parted, Split.VALIDATION, [Split.TRAIN]) == 0
    assert with_components(parted[1:]) == parted[1:]


def test_pairs_and_listed_duplicates_join() -> None:
    records = [Record(isic(n), "", "A") for n in range(5)]
    found = components(records, [(0, 1)], [(isic(1), isic(3)), (isic(3), isic(9))]).tolist()
    assert found[0] == found[1] == found[3]
    assert len(set(found)) == 3


def test_listed_duplicates_join_whatever_they_are_called() -> None:
    names = ["case_17", "images/case_90.jpg", "case_91"]
    records = [Record(name, "", "A") for name in names] + [Record("case_90", "", "B")]
    found = components(records, (), [("case_17", "case_90")]).tolist()
    assert found[0] == found[1] == found[3] != found[2]


@given(
    st.lists(
        st.tuples(st.integers(0, 20), st.none() | st.integers(0, 8), st.none() | st.integers(0, 8)),
        max_size=60,
    )
)
def test_equal_ids_are_never_apart_whatever_the_order(rows: list) -> None:
    records = [
        Record(
            isic(image),
            "",
            "A",
            lesion=None if lesion is None else f"HAM_{lesion}",
            patient=None if patient is None else f"IP_{patient}",
        )
        for image, lesion, patient in rows
    ]
    names = names_of(records, components(records))
    for attribute in ("image", "lesion", "patient"):
        by_value: dict[str, set[str]] = {}
        for record, name in zip(records, names, strict=True):
            if (value := getattr(record, attribute)) is not None:
                by_value.setdefault(value, set()).add(name)
        assert all(len(found) == 1 for found in by_value.values())
    backwards = names_of(records[::-1], components(records[::-1]))
    assert backwards[::-1] == names


def test_on_the_real_tables_isic_2019_joins_ham10000(shared_data: Path) -> None:
    folders = [shared_data / "ham10000", shared_data / "isic2019"]
    records, _ = gather(read_datasets(folders))
    names = names_of(records, components(records))
    own = dict(zip([(r.dataset, r.image) for r in records], names, strict=True))
    ham = [record for record in records if record.dataset == "HAM10000"]
    assert all(own["ISIC 2019", r.image] == own["HAM10000", r.image] for r in ham)
