"""A fitted run to a bundle: one wrapped network in three formats, each checked against eager."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import torch
from torch import nn
from tqdm import tqdm

from models.bundle import (
    NAME,
    VERSION,
    Artifact,
    ArtifactFormat,
    Bundle,
    Golden,
    InputSpec,
    Manifest,
    Outputs,
    Task,
    check_replaceable,
    golden_image,
    save_bundle,
    sha256_of,
)
from models.calibration import CalibrationError, calibrate
from training.data.cache import Pixels
from training.data.manifest import DataError, Record
from training.data.vocabulary import Sex, Site, Split
from training.fit import build_network
from training.folds import members
from training.half import rounded, store_in_half
from training.lineage import training_data
from training.memory import keep_freed_memory
from training.network import MultiTaskNetwork, ServedEnsemble, ServedNetwork
from training.ood import choose_ood_threshold, fit_feature_distance, middle_features
from training.run import Run, rows, to_calibrate_on
from training.runners import eager, onnx_runner, open_runner, run_batches, torchscript
from training.state import (
    belongs,
    check_best,
    identity_of,
    is_finished,
    load_tensors,
    of_another_version,
)
from training.tasks import DIAGNOSES

AGE_EDGES = (30.0, 45.0, 60.0, 75.0)
AGE_LABELS = ("0-29", "30-44", "45-59", "60-74", "75+")
TASKS = (
    Task(name="melanoma", kind="binary", labels=("not melanoma", "melanoma")),
    Task(name="age", kind="ordinal", labels=AGE_LABELS, bin_edges=AGE_EDGES),
    Task(name="site", kind="categorical", labels=tuple(Site)),
    Task(name="sex", kind="categorical", labels=tuple(Sex)),
    Task(name="diagnosis", kind="categorical", labels=DIAGNOSES),
)
FILES: dict[ArtifactFormat, str] = {
    "onnx": "model.onnx",
    "torch_export": "model.pt2",
    "torchscript": "model.torchscript.pt",
}
# Between an artifact and eager torch, on every output, on real images; and between machines, on the
# golden ones, whose features lie further out.
AGREEMENT = 1e-3
GOLDEN_TOLERANCE = 1e-2
CHECKED_IMAGES = 100
BATCH_SIZES = (1, 8)
GOLDEN_SEEDS = (0, 1, 2)


def bundle_name(backbone: str) -> str:
    """What a bundle is called where nobody names it."""
    return f"mmtl-{backbone.removeprefix('tf_efficientnet_').replace('_', '-').lower()}"


def export(
    run: Run, folder: Path, views: int = 1, name: str = "", version: str = "0.1.0"
) -> tuple[Bundle, dict[str, float]]:
    """Calibrate the run's best network on its validation split and write it as a bundle.

    Args:
        run: Fitted.
        folder: Of the bundle; one that is there is replaced as a whole.
        views: Of each image that are answered together, as `ServedNetwork` has them.
        name: Of the bundle, in every answer of the service; `bundle_name`'s where it is empty.
        version: Likewise, as Semantic Versioning has it.

    Returns:
        The bundle, and by artifact the largest difference from eager torch.

    Raises:
        DataError: The run is not fitted, an artifact disagrees with eager torch, or a bundle cannot
            be called so.
    """
    config = run.load_config()
    name = name or bundle_name(config.backbone)
    if not re.fullmatch(NAME, name):
        raise DataError(f"A bundle cannot be called {name!r}: small letters, digits and -.")
    if not re.fullmatch(VERSION, version):
        raise DataError(f"A bundle's version is three numbers, 1.0.2, not {version!r}.")
    check_replaceable(folder)
    keep_freed_memory()
    records, pixels = run.load_data()
    validation = to_calibrate_on(records, config)
    train = rows(records, Split.TRAIN)
    first = torch.from_numpy(np.array(pixels[:1])).permute(0, 3, 1, 2)
    networks = [rounded(network, first) for network in load_networks(run, records)]
    each = [
        ServedNetwork(
            network,
            AGE_EDGES,
            fit_feature_distance(middle_features(network, pixels, train, config)),
            views,
        )
        for network in networks
    ]
    served = (each[0] if len(each) == 1 else ServedEnsemble(each)).eval()
    of_several = f", {len(each)} networks together" if len(each) > 1 else ""
    melanoma = np.array([bool(records[row].melanoma) for row in validation])
    with TemporaryDirectory() as temporary:
        files = write_artifacts(served, Path(temporary), pixels[:1])
        outputs = run_batches(onnx_runner(files["onnx"]), pixels, validation, 32)
        try:
            calibration, threshold, point = calibrate(
                outputs["melanoma_logit"],
                melanoma,
                f"{config.validate_on} validation split".strip(),
            )
        except CalibrationError as error:
            raise DataError(f"{run.folder}, validation split: {error}") from None
        checked = np.linspace(0, len(records) - 1, min(CHECKED_IMAGES, len(records))).astype(int)
        differences = compare_artifacts(served, files, pixels, checked.tolist())
        golden = np.stack([golden_image(seed, *pixels.shape[1:3]) for seed in GOLDEN_SEEDS])
        manifest = Manifest(
            name=name,
            version=version,
            description=(
                f"M-MTL on {config.backbone}{of_several}: melanoma, age, site, sex and diagnosis "
                "from dermoscopic images. Research software, not a medical device."
            ),
            input=InputSpec(height=pixels.shape[1], width=pixels.shape[2]),
            tasks=TASKS,
            artifacts=tuple(
                Artifact(
                    file=path.name,
                    format=artifact_format,
                    precision="fp32",
                    bytes=path.stat().st_size,
                    sha256=sha256_of(path),
                    calibration=calibration,
                    melanoma_threshold=threshold,
                    ood_threshold=choose_ood_threshold(outputs["ood_score"]),
                    tolerance=GOLDEN_TOLERANCE,
                )
                for artifact_format, path in files.items()
            ),
            prevalence=float(melanoma.mean()),
            operating_point=point,
            training_data=training_data(run),
            golden=tuple(
                Golden(seed=seed, outputs=golden_outputs(eager(served)(golden), row))
                for row, seed in enumerate(GOLDEN_SEEDS)
            ),
        )
        bundle = save_bundle(folder, manifest, {path.name: path for path in files.values()})
    return bundle, differences


def golden_outputs(outputs: Outputs, row: int) -> dict[str, tuple[float, ...]]:
    """One golden image's outputs, as a manifest holds them; the heat map is too long for it."""
    return {
        name: tuple(np.ravel(values[row]).astype(float).round(6).tolist())
        for name, values in outputs.items()
        if name != "melanoma_map"
    }


def load_networks(run: Run, records: list[Record]) -> list[MultiTaskNetwork]:
    """The best network of a run, or of each of its ensemble, as `load_fitted` has them."""
    return [load_fitted(member, own) for member, own in members(run, records)]


def load_fitted(run: Run, records: list[Record]) -> MultiTaskNetwork:
    """The run's best network, on the CPU, in evaluation mode.

    Raises:
        DataError: The run has none, or was fitted on other data than `records`.
    """
    if not run.checkpoint.is_file():
        raise DataError(f"{run.folder} is not fitted. Run `mmtl-train fit` first.")
    config = run.load_config()
    saved = load_tensors(run.checkpoint)
    if missing := [name for name in ("identity", "best", "epoch", "stale") if name not in saved]:
        raise of_another_version(run.checkpoint, f"it has no {missing[0]}")
    check_best(run, saved["best"])
    if not belongs(saved, identity_of(config, records)):
        raise DataError(
            f"{run.folder} was fitted on other data than its manifest names. "
            f"Delete {run.checkpoint} and fit again."
        )
    if not is_finished(saved["epoch"], saved["stale"], config):
        tqdm.write(
            f"{run.folder} was stopped after {saved['epoch']} of {config.epochs} epochs, and its "
            "best network so far is taken; `mmtl-train fit` goes on with it."
        )
    network = build_network(config, pretrained=False)
    try:
        network.load_state_dict(load_tensors(run.best))
    except RuntimeError:
        raise of_another_version(run.best, "it is of another network") from None
    return network.eval()


def write_artifacts(served: nn.Module, folder: Path, example: Pixels) -> dict[ArtifactFormat, Path]:
    """Write the network in every format; the ONNX file's weights in half precision."""
    images = torch.from_numpy(np.repeat(np.asarray(example), 2, axis=0))
    paths = {artifact_format: folder / name for artifact_format, name in FILES.items()}
    free = {"images": {0: torch.export.Dim("batch", min=1, max=1024)}}
    program = torch.export.export(served, (images,), dynamic_shapes=free)
    torch.export.save(program, paths["torch_export"])
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.onnx.export(
        program,
        (),
        paths["onnx"],
        dynamo=True,
        input_names=["images"],
        output_names=list(ServedNetwork.OUTPUTS),
        external_data=False,
        verbose=False,
    )
    model = onnx.load(paths["onnx"])
    for node in model.graph.node:
        del node.metadata_props[:]  # where in our sources it is from, in this machine's folders
    store_in_half(model)
    onnx.save(model, paths["onnx"])
    with torchscript():
        traced = torch.jit.trace(served, images, strict=False)  # type: ignore[no-untyped-call]  # torch's own gap
        torch.jit.save(traced, paths["torchscript"])
    return paths


def compare_artifacts(
    served: nn.Module,
    files: Mapping[ArtifactFormat, Path],
    pixels: Pixels,
    positions: list[int],
) -> dict[str, float]:
    """The largest difference of each artifact from eager torch, over all outputs and batch sizes.

    Raises:
        DataError: It is more than `AGREEMENT`.
    """
    expected = run_batches(eager(served), pixels, positions, 1)
    differences: dict[str, float] = {}
    for artifact_format, path in files.items():
        runner = open_runner(artifact_format, path)
        for batch_size in BATCH_SIZES:
            found = run_batches(runner, pixels, positions, batch_size)
            for name, values in expected.items():
                difference = float(np.abs(found[name] - values).max())
                differences[path.name] = max(difference, differences.get(path.name, 0.0))
                if not difference <= AGREEMENT:
                    raise DataError(
                        f"{path.name} differs from eager torch by {difference:.2g} on {name} at "
                        f"batch {batch_size}; at most {AGREEMENT:g} is allowed. Nothing written."
                    )
    return differences
