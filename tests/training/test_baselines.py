"""What metadata alone can say, and what they must not be asked."""

import numpy as np

from training.baselines import MetadataModel, truth_of
from training.data.manifest import Record
from training.data.vocabulary import Sex, Site


def test_a_task_is_foretold_from_the_other_metadata_alone() -> None:
    """Of sexes drawn at random, age and site say nothing: the sex itself would say all."""
    generator = np.random.default_rng(0)
    records = [
        Record(str(i), "", "d", age=float(age), sex=list(Sex)[sex], site=list(Site)[site])
        for i, (age, sex, site) in enumerate(
            zip(
                generator.integers(20, 80, 400),
                generator.integers(0, 2, 400),
                generator.integers(0, 6, 400),
                strict=True,
            )
        )
    ]
    labels = {"sex": [str(sex) for sex in Sex], "age": ["0-29", "30+"]}
    model = MetadataModel(records[:200], labels, [30.0])
    for task in labels:
        truth = truth_of(task, records[200:], labels[task], [30.0])
        found = model.task(task, records[200:], truth)
        assert found is not None
        assert found["accuracy"] < {"sex": 0.65, "age": 0.9}[task]
