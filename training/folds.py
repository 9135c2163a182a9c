"""The networks of an ensemble: each is fitted with another part of the training images held out.

A network that did not learn from a part stops where it does best on that part, so that the
validation split has chosen nothing when the ensemble is calibrated on it (bagging: Breiman 1996;
as cross-validated committees: Parmanto, Munro & Doyle 1996).
"""

from collections.abc import Sequence

from training.config import Config
from training.data.components import with_components
from training.data.manifest import DataError, Record, load_manifest, save_manifest
from training.data.splits import hold_out
from training.run import Run
from training.state import belongs, identity_of, load_tensors


def members(run: Run, records: Sequence[Record]) -> list[tuple[Run, list[Record]]]:
    """The runs that fit a run's networks, each with its records; itself, where it has one network.

    Args:
        run: Prepared.
        records: Of its manifest.

    Raises:
        DataError: There are too few components to part.
    """
    return [(member, own) for member, _, own in parts(run, run.load_config(), records)]


def parts(
    run: Run, config: Config, records: Sequence[Record]
) -> list[tuple[Run, Config, list[Record]]]:
    """As `members`, each with its configuration, of a run that need not be prepared."""
    if config.folds == 1:
        return [(run, config, list(records))]
    parted = hold_out(with_components(records), config.folds, config.seed)
    # Other initial heads, another order: what the networks do not share is averaged out.
    return [
        (
            member,
            config.model_copy(update={"folds": 1, "seed": (config.seed + number) % 2**32}),
            own,
        )
        for number, (member, own) in enumerate(zip(_folders(run, config), parted, strict=True))
    ]


def fitted(run: Run, config: Config) -> bool:
    """Whether any network of a run is, at least in part."""
    return any(member.checkpoint.is_file() for member in _folders(run, config))


def check_unfitted(run: Run, config: Config, records: Sequence[Record]) -> None:
    """Whether a run was not fitted to other data before: what it has learned from would be lost.

    Raises:
        DataError: It was.
    """
    if not fitted(run, config):
        return
    for member, its_config, its_records in parts(run, config, records):
        if member.checkpoint.is_file() and not belongs(
            load_tensors(member.checkpoint), identity_of(its_config, its_records)
        ):
            raise fitted_to_other_data(member)


def fitted_to_other_data(run: Run) -> DataError:
    """What to say of a run that has learned from something else than it is given now."""
    return DataError(
        f"{run.folder} was fitted to other data. Choose another folder with --run, or delete "
        "its checkpoint.pt and best.pt (of an ensemble, its folders fold-N)."
    )


def _folders(run: Run, config: Config) -> list[Run]:
    if config.folds == 1:
        return [run]
    return [Run(run.folder / f"fold-{n}") for n in range(1, config.folds + 1)]


def prepare_members(run: Run) -> None:
    """Give each network of an ensemble its run, inside the run's folder.

    Raises:
        DataError: There are too few components to part, a folder holds another configuration, or
            its network was fitted to another part (before other data, or another scikit-learn).
    """
    whole = run.load_config()
    if whole.folds == 1:
        return
    # Their manifests are about to be written, which tell what they have learned from.
    check_unfitted(run, whole, load_manifest(run.manifest))
    for member, config, records in parts(run, whole, load_manifest(run.manifest)):
        member.save_config(config)
        member.take_pixels(run)
        save_manifest(member.manifest, records)
