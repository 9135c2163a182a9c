"""The networks of an ensemble: each is fitted with another part of the training images held out.

A network that did not learn from a part stops where it does best on that part, so that the
validation split has chosen nothing when the ensemble is calibrated on it (bagging: Breiman 1996;
as cross-validated committees: Parmanto, Munro & Doyle 1996).
"""

from collections.abc import Sequence

from training.data.components import with_components
from training.data.manifest import Record, load_manifest, save_manifest
from training.data.splits import hold_out
from training.run import Run


def members(run: Run, records: Sequence[Record]) -> list[tuple[Run, list[Record]]]:
    """The runs that fit a run's networks, each with its records; itself, where it has one network.

    Args:
        run: Prepared.
        records: Of its manifest.

    Raises:
        DataError: There are too few components to part.
    """
    config = run.load_config()
    if config.folds == 1:
        return [(run, list(records))]
    parted = hold_out(with_components(records), config.folds, config.seed)
    return [(Run(run.folder / f"fold-{n}"), own) for n, own in enumerate(parted, start=1)]


def prepare_members(run: Run) -> None:
    """Give each network of an ensemble its run, inside the run's folder.

    Raises:
        DataError: There are too few components to part, or a folder holds another configuration.
    """
    config = run.load_config()
    if config.folds == 1:
        return
    for number, (member, records) in enumerate(members(run, load_manifest(run.manifest))):
        # Other initial heads, another order: what the networks do not share is averaged out.
        seed = (config.seed + number) % 2**32
        member.save_config(config.model_copy(update={"folds": 1, "seed": seed}))
        member.take_pixels(run)
        save_manifest(member.manifest, records)
