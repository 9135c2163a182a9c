"""Fit M-MTL: the loop over epochs, batches and validation images."""

import csv
import math
import os
import shutil
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader
from tqdm import tqdm

from models.files import clear_unfinished, write_atomically
from models.memory import give_back
from training.backbones import source_of
from training.config import Config, Precision
from training.data.cache import Pixels
from training.data.manifest import DataError, load_manifest
from training.distillation import open_teachers, soft_targets
from training.draws import AugmentedImages, context_of, draw, targets_of
from training.feature_maps import build_feature_map
from training.folds import members, prepare_members
from training.gradients import FasterGradients
from training.lineage import check_inherited
from training.losses import MultiTaskLoss, Part
from training.memory import keep_freed_memory
from training.network import MultiTaskNetwork, melanoma_log_odds
from training.plots import curves
from training.run import Run, to_learn_from
from training.runners import batches
from training.state import State, identity_of, load_tensors, save_tensors
from training.tasks import MISSING, Targets, encode_targets, without_untaught
from training.team import Team, gather
from training.tensorboard import open_scalars
from training.zoo import choose

# Images at a time, where nothing is learned of them.
_BATCH = 64


def build_network(config: Config, pretrained: bool = True) -> MultiTaskNetwork:
    """The network of a configuration, its heads drawn from the seed.

    Raises:
        training.backbones.WeightsError: The pretrained weights are missing.
    """
    torch.manual_seed(config.seed)
    if pretrained:
        source, entry = source_of(config)
    else:
        source, (entry,) = None, choose([config.backbone])
    backbone, channels, mean, std = build_feature_map(entry, source, config.drop_path, config.size)
    return MultiTaskNetwork(backbone, channels, config.trunk_channels, mean, std)


class Step(nn.Module):
    """What is differentiated: the network and its loss.

    Args:
        network: To be trained.
        loss: Of it; may have parameters of its own.
        precision: Of the network's arithmetic.
    """

    def __init__(
        self, network: MultiTaskNetwork, loss: MultiTaskLoss, precision: Precision = "float32"
    ):
        super().__init__()
        self.network = network
        self.loss = loss
        self.mixed_precision = precision == "bfloat16"

    def forward(
        self, images: Tensor, targets: Targets, part: Part | None
    ) -> tuple[Tensor, dict[str, float]]:
        """As `MultiTaskLoss` gives it; targets of mixtures are twice as many as images."""
        logits = self.logits(images, targets)
        loss, parts = self.loss(logits, targets, part)
        if not loss.requires_grad:  # no label in this process's part of the batch
            loss = loss + 0 * logits["melanoma"].sum()
        return loss, parts

    @torch.no_grad()
    def follow(self, images: Tensor, targets: Targets, part: Part | None) -> None:
        """Let the loss see where a step on these images has led."""
        self.loss.follow(self.logits(images, targets), targets, part)

    def logits(self, images: Tensor, targets: Targets) -> dict[str, Tensor]:
        """One row a target."""
        device = images.device.type
        mixed = torch.autocast(device, torch.bfloat16, enabled=self.mixed_precision)
        with mixed, FasterGradients() if device == "cpu" else nullcontext():
            logits: dict[str, Tensor] = self.network(images)
        logits = {task: values.float() for task, values in logits.items()}
        if targets.weights is None:
            return logits
        return {task: torch.cat([values, values]) for task, values in logits.items()}


def fit(run: Run, workers: int = 2, pretrained: bool = True) -> float:
    """Fit the run's network, or each of its ensemble, from its checkpoint where there is one.

    Several processes (`torchrun --no-python -- mmtl-train fit`) share each batch, and fit what one
    would; the run's folder must be seen by all. Batch norm has to be frozen then.

    Args:
        run: Prepared. Its log, checkpoint and best weights are written.
        workers: Processes that augment images, for each that trains.
        pretrained: Start from ImageNet weights.

    Returns:
        The best validation AUROC for melanoma; of an ensemble, the mean over its networks, each on
        the images held out from it.

    Raises:
        DataError: The run is not prepared, another process works on it, it has no image to train
            on, a teacher does not fit, the loss is not finite, or it cannot be shared among
            processes.
        models.bundle.BundleError: A teacher is no whole bundle.
    """
    with gather() as team, run.alone() if team.leads else nullcontext():
        with team.leader_first():
            if team.leads:
                prepare_members(run)
        runs = [member for member, _ in members(run, load_manifest(run.manifest))]
        for member in runs:
            to_learn_from(load_manifest(member.manifest), member.load_config(), member.manifest)
            if team.leads:
                clear_unfinished(member.folder)
        best = []
        for number, member in enumerate(runs, start=1):
            if len(runs) > 1 and team.leads:
                tqdm.write(f"Network {number} of {len(runs)}: {member.folder}")
            best.append(_fit(member, workers, pretrained, team))
        return float(np.mean(best))


def _fit(run: Run, workers: int, pretrained: bool, team: Team) -> float:
    config = run.load_config()
    records, pixels = run.load_data()
    targets = encode_targets(records)
    train, validation = to_learn_from(records, config, run.manifest)
    keep_freed_memory()
    teachers = open_teachers(config.teachers, config.size)
    if teachers:
        with team.leader_first():
            targets = replace(targets, soft=soft_targets(run, teachers, records, pixels, train))
    targets, left_out = without_untaught(targets, records, train)
    loss = MultiTaskLoss(config, targets.take(torch.tensor(train)))
    resumes = run.checkpoint.is_file()  # which holds all weights: where they came from may be gone
    network = build_network(config, pretrained and not resumes)
    if config.start_from and not resumes:
        before = Run(Path(config.start_from))
        check_inherited(run, before)
        start(network, before)
    elif not resumes:
        network.leave_out(left_out)
    check_shareable(network, config, len(train), team)
    state = State(network, loss, config, len(train), team.device)
    if config.compile:
        check_compiler(team.device)
        state.network.compile()
    identity = identity_of(config, records, teachers)
    state.resume(run, identity)
    state.precision = team.told(state.precision)
    if team.leads and config.precision == "auto" and state.precision != "float32":
        tqdm.write(f"Computing in {state.precision} (precision = auto).")
    if team.leads and state.history:  # what was stopped after a checkpoint had not written its log
        _show(run, state.history)
    with open_scalars(run, state.epoch) if team.leads else nullcontext() as scalars:
        if scalars is not None and state.history:
            scalars.add({name: float(value) for name, value in state.history[-1].items()})
        while not state.finished:
            started = time.monotonic()
            images = AugmentedImages(
                pixels, draw(train, targets, config, state.epoch), config, state.epoch
            )
            losses = train_one_epoch(state, images, targets, workers, team)
            scores: dict[str, float] = team.told(
                validate(state.average.module, state.loss, pixels, targets, validation)
                if team.leads
                else None
            )
            if not all(map(math.isfinite, scores.values())):
                raise diverged(state.epoch)
            improved = scores["validation_auroc"] > state.best
            if improved and team.leads:
                save_tensors(run.best, state.average.module.state_dict())
            state.advance(scores["validation_auroc"])
            row = {
                "epoch": state.epoch,
                "learning_rate": state.learning_rate,
                **losses,
                **scores,
                "seconds": time.monotonic() - started,
            }
            state.history.append({name: f"{value:.6g}" for name, value in row.items()})
            if scalars is None:  # not the leader
                continue
            state.save(run, identity)
            _show(run, state.history)
            scalars.add(row)
            tqdm.write("  ".join(f"{name} {value}" for name, value in state.history[-1].items()))
    return state.best


def check_compiler(device: torch.device) -> None:
    """Whether torch.compile finds what it needs.

    Raises:
        DataError: On a CPU, it needs a C++ compiler.
    """
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise DataError(
            f"compile needs a C++ compiler on a CPU, and there is no {compiler}: install one, or "
            "prepare a run without compile."
        )


def check_shareable(network: MultiTaskNetwork, config: Config, images: int, team: Team) -> None:
    """Refuse what several processes would fit otherwise than one.

    Raises:
        DataError: Batch norm would see a part of each batch, or a process no image at all.
    """
    if team.size == 1:
        return
    norms = (isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
    if not config.freeze_batch_norm and any(norms):
        raise DataError(
            f"{team.size} processes would each normalise a part of the batch: set "
            "freeze_batch_norm, or fit with one process."
        )
    if min(config.batch_size, images) < team.size:
        raise DataError(
            f"{team.size} processes cannot share batches of {min(config.batch_size, images)}."
        )


def start(network: MultiTaskNetwork, run: Run) -> None:
    """Load another run's best weights.

    Raises:
        DataError: They are of another network.
    """
    try:
        network.load_state_dict(load_tensors(run.best))
    except RuntimeError:
        raise DataError(
            f"start_from: the network of {run.folder} has another backbone or other heads."
        ) from None


def train_one_epoch(
    state: State, images: AugmentedImages, targets: Targets, workers: int, team: Team
) -> dict[str, float]:
    """One pass over the training images; the mean of each task's loss over batches that have it.

    Each process of the team takes its share of every batch, and all make the same steps.

    Raises:
        DataError: The loss is not finite, or a worker died.
    """
    config, network = state.config, state.network
    drop_last = len(images) >= config.batch_size
    whole = list(BatchSampler(range(len(images)), config.batch_size, drop_last))
    loader = DataLoader(
        images,
        batch_sampler=[list(team.share(one)) for one in whole],
        num_workers=workers,
        multiprocessing_context=context_of(workers),
    )
    state.loss.train()
    set_mode(network, config, images.epoch)
    torch.manual_seed(config.seed * 1_000_003 + images.epoch)
    step = Step(network, state.loss, state.precision)
    shared = team.join(step)
    # What the heap holds, forked workers would share, and the first step copy page by page.
    give_back()
    sums = dict.fromkeys(targets.classes, 0.0)
    seen: Counter[str] = Counter()
    bar = tqdm(loader, f"epoch {images.epoch + 1}", unit="batch", disable=not team.leads)
    try:
        for number, (batch, positions, partners, shares) in enumerate(bar, start=1):
            group = (number - 1) // config.accumulate
            # Of this stride, it is channels_last as it stands.
            batch = batch.to(state.device).permute(0, 3, 1, 2)
            chosen = targets_of(targets, config, positions, partners, shares)
            part = team.part(chosen)
            chosen = chosen.to(state.device)
            # The last step of an epoch may have fewer batches.
            batches_of_step = min(config.accumulate, len(loader) - group * config.accumulate)
            completes = number % config.accumulate == 0 or number == len(loader)
            drawn = len(whole[number - 1])
            with team.gradients(shared, completes), team.draws(drawn):
                loss, parts = shared(batch, chosen, part)
                if not math.isfinite(team.sum(loss.detach()).item()):
                    raise diverged(images.epoch)
                # The team's gradient is the mean over processes; the batch's is their sum.
                (loss * team.size / batches_of_step).backward()
            for task, value in parts.items():
                sums[task] += value
            seen.update(parts.keys())
            if completes:
                state.optimizer.step()
                state.optimizer.zero_grad()
                state.scheduler.step()
                state.average.update_parameters(network)
                if state.loss.famo is not None:
                    with team.draws(drawn):
                        step.follow(batch, chosen, part)
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):  # it died, and raised nothing itself
            raise
        raise DataError(
            f"A process that augments images died in epoch {images.epoch + 1} (out of memory, most "
            "often); the last whole epoch is kept. Fit again, with fewer --workers."
        ) from None
    summed = team.sum(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist()
    return {
        f"train_{task}": value / seen[task]
        for task, value in zip(sums, summed, strict=True)
        if task in seen
    }


def diverged(epoch: int) -> DataError:
    """What to say of a loss that is not finite."""
    kept = "; the last whole epoch is kept" if epoch else ""
    return DataError(
        f"The loss of epoch {epoch + 1} is not finite{kept}. Prepare another run with a lower "
        "learning_rate."
    )


def set_mode(network: MultiTaskNetwork, config: Config, epoch: int) -> None:
    """Training mode, but for what is frozen in this epoch."""
    frozen = epoch < config.frozen_epochs
    network.train()
    network.backbone.requires_grad_(not frozen)
    if frozen:
        network.backbone.eval()
    elif config.freeze_batch_norm:
        freeze_batch_norm(network.backbone)


def freeze_batch_norm(module: nn.Module) -> None:
    """Keep its statistics as they are, until it is set to training mode again."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval()


def validate(
    network: nn.Module,
    loss: MultiTaskLoss,
    pixels: Pixels,
    targets: Targets,
    positions: list[int],
) -> dict[str, float]:
    """AUROC for melanoma and each task's loss on unaugmented images; NaN where it diverged."""
    logits = predict_logits(network, pixels, positions)
    _, parts = loss.cpu().eval()(logits, targets.take(torch.tensor(positions)))
    loss.to(next(network.parameters()).device)
    melanoma = targets.classes["melanoma"][positions]
    known = melanoma != MISSING
    scores = melanoma_log_odds(logits["melanoma"], logits["diagnosis"])
    auroc = roc_auc_score(melanoma[known], scores[known]) if scores.isfinite().all() else math.nan
    return {"validation_auroc": float(auroc)} | {f"validation_{k}": v for k, v in parts.items()}


@torch.inference_mode()
def predict_logits(network: nn.Module, pixels: Pixels, positions: list[int]) -> dict[str, Tensor]:
    """The logits of some images, by task, on the CPU."""
    network.eval()
    device = next(network.parameters()).device
    parts = [
        {task: value.cpu() for task, value in network(batch.to(device).permute(0, 3, 1, 2)).items()}
        for batch in batches(pixels, positions, _BATCH)
    ]
    return {task: torch.cat([part[task] for part in parts]) for task in parts[0]}


def _show(run: Run, history: list[dict[str, str]]) -> None:
    """Write the log and the curves."""
    # A task whose only labels are few may have none in an epoch that lost its last batch.
    columns = dict.fromkeys(name for row in history for name in row)
    with write_atomically(run.log) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns], restval="")
        writer.writeheader()
        writer.writerows(history)
    with write_atomically(run.curves) as temporary:
        temporary.write_text(curves(history))
