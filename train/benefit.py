"""Does pretraining help? Synthetic HKH, synthetic competition, and `solution.py` on tiles of neither.

The whole way of a user in small: scenes and polygons to a store, pretraining, fine-tuning on a few tiles with
and without it (same seed, same steps), packing, masks by `solution.py`, and their MCC.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Iterator, NamedTuple, Sequence

import numpy as np
from tqdm import tqdm

from prep import competition, hkh
from prep.hkh_sample import LABELS_FILE, SCENES_FOLDER, write_hkh_sample
from prep.store import SPLIT_SCHEME
from prep.synthetic import write_sample
from train.config import Config, load_config
from train.files import FOLD_FILE, fold_folder, write_text
from train.fit import fit_fold
from train.mask_files import CLASSES
from train.package import pack
from train.score_masks import score_masks

PROJECT = Path(__file__).resolve().parents[1]
SMOKE = PROJECT / "train" / "configs" / "smoke.yaml"
PRETRAIN = PROJECT / "train" / "configs" / "pretrain.yaml"
SEEDS = {"hkh": 0, "training": 50, "test": 90}  # of the synthetic scenes
TRAINING_TILES = 5  # as many as there are folds; fold 0 trains on four of them
TUNING_RATE = 5e-5  # of `make train-all PRETRAINED=...`
SCRATCH_RATE = 1e-3  # the kit's default


class Scale(NamedTuple):
    """How much of it: scenes, sides in pixels, steps, and the seeds of fine-tuning."""

    scenes: int = 8
    scene_size: int = 512
    tile_size: int = 256
    test_tiles: int = 6
    crop: int = 96
    batch: int = 8
    pretrain_steps: int = 320
    tuning_steps: int = 60
    seeds: tuple[int, ...] = (0, 1, 2)
    threads: int = 1


SMALLEST = Scale(4, 128, 64, 2, 64, 4, 20, 10, (0,))  # for the test that it runs


class Variant(NamedTuple):
    """A way to fine-tune: with the pretrained weights and statistics or without, and the learning rate."""

    pretrained: bool
    rate: float

    def spell(self) -> str:
        """Return its name in the report."""
        return f"{'pretrained' if self.pretrained else 'random weights'}, learning rate {self.rate:g}"


RATES = (TUNING_RATE, SCRATCH_RATE)
VARIANTS = tuple(Variant(pretrained, rate) for rate in RATES for pretrained in (True, False))


class Score(NamedTuple):
    """MCC of a fine-tuned network on the test tiles, over pixels with data: four classes, and extent."""

    variant: Variant
    seed: int
    four_class: float
    extent: float


class Benefit(NamedTuple):
    """All scores, the pretraining's own score on its validation scenes, and how long all of it took."""

    scale: Scale
    scores: list[Score]
    pretrain_mcc: float
    seconds: float


def measure(work: Path, scale: Scale, variants: Sequence[Variant] = VARIANTS) -> Benefit:
    """Go the whole way in the new folder `work` and return the scores.

    Raises what its steps raise.
    """
    started = time.monotonic()
    stores = make_data(work, scale)
    record = fit_fold(pretrain_config(stores["hkh"], scale), 0, work / "pretrain")
    checkpoint = fold_folder(work / "pretrain", 0) / FOLD_FILE
    scores = []
    for variant in variants:
        for seed in scale.seeds:
            run = work / f"{'pretrained' if variant.pretrained else 'random'}-{variant.rate:g}-{seed}"
            fit_fold(tuning_config(stores["training"], scale, variant, seed, checkpoint), 0, run)
            weights = pack(run, None, run / "model.pth")
            predict(work / "test", run / "masks", weights)
            scores.append(Score(variant, seed, *score(work / "test", run / "masks")))
    return Benefit(scale, scores, record["val_mcc"], time.monotonic() - started)


def make_data(work: Path, scale: Scale) -> dict[str, Path]:
    """Write the synthetic data; return the tile stores "hkh" and "training"."""
    stores = {name: work / f"{name}-store" for name in ("hkh", "training")}
    write_hkh_sample(work / "hkh", scale.scenes, scale.scene_size, SEEDS["hkh"])
    source = hkh.Source(work / "hkh" / SCENES_FOLDER, work / "hkh" / LABELS_FILE)
    keep = hkh.Filter(min_debris=20, min_lake=5, min_glacier=20, max_background=0.9)
    hkh.prepare(source, stores["hkh"], hkh.Settings(hkh.Grid(scale.tile_size, 0), keep))
    write_sample(work / "training", TRAINING_TILES, scale.tile_size, SEEDS["training"], "training", "phase2")
    competition.prepare(work / "training", stores["training"])
    write_sample(work / "test", scale.test_tiles, scale.tile_size, SEEDS["test"], "platform", "phase2")
    return stores


def settings(store: Path, scale: Scale, steps: int, seed: int) -> list[str]:
    """Return what pretraining and fine-tuning set alike, as overrides of smoke.yaml."""
    epochs = 4
    return [
        f"data.store={store}",
        f"data.crop={scale.crop}",
        f"data.batch_size={scale.batch}",
        f"data.steps_per_epoch={steps // epochs}",
        f"train.epochs={epochs}",
        f"train.seed={seed}",
        f"train.threads={scale.threads}",
        f"optim.warmup_steps={steps // 10}",
        "optim.ema_decay=0.9",
    ]


def pretrain_config(store: Path, scale: Scale) -> Config:
    """Return the pretraining's config: loss and class shares of pretrain.yaml, the rest of smoke.yaml."""
    published = load_config(PRETRAIN)
    loss = [f"loss.{key}={value}" for key, value in vars(published.loss).items() if value is not None]
    shares = f"data.class_shares={list(published.data.class_shares)}"
    common = settings(store, scale, scale.pretrain_steps, seed=0)
    return load_config(SMOKE, [*common, *loss, shares, f"data.scheme={SPLIT_SCHEME}"])


def tuning_config(store: Path, scale: Scale, variant: Variant, seed: int, checkpoint: Path) -> Config:
    """Return a fine-tuning's config; variants differ in first weights, statistics and rate alone."""
    start = [f"model.pretrained={checkpoint}"] if variant.pretrained else []
    common = settings(store, scale, scale.tuning_steps, seed)
    return load_config(SMOKE, [*common, f"optim.lr={variant.rate}", "train.keep=last", *start])


def predict(data: Path, out: Path, weights: Path) -> None:
    """Run `solution.py` as its user does."""
    command = [sys.executable, str(PROJECT / "solution.py"), str(data), str(out), "--weights", str(weights)]
    subprocess.run(command, check=True, capture_output=True)


def score(data: Path, masks: Path) -> tuple[float, float]:
    """Return the MCC of masks over pixels with data: of four classes, and of glacier against the rest."""
    scores = score_masks(masks, data, phase="phase2", values=CLASSES, data=data)["valid_pixels"]
    return scores["four_class"]["mcc"], scores["binary"]["mcc"]


# --- The report -----------------------------------------------------------------------------------


def mean_of(benefit: Benefit, variant: Variant) -> tuple[float, float]:
    """Return the mean MCC of a variant over the seeds: four classes, extent."""
    scores = [score for score in benefit.scores if score.variant == variant]
    return float(np.mean([s.four_class for s in scores])), float(np.mean([s.extent for s in scores]))


def format_report(benefit: Benefit, command: str) -> str:
    """Return the report in Markdown."""
    return "\n".join(_lines(benefit, command)) + "\n"


def _lines(benefit: Benefit, command: str) -> Iterator[str]:
    scale = benefit.scale
    yield from [
        "# Does pretraining on HKH help? Synthetic data",
        "",
        f"`{command}` ({benefit.seconds / 60:.1f} min, {scale.threads} thread(s))",
        "",
        f"{scale.scenes} synthetic Landsat-7 scenes of {scale.scene_size} px (8-bit, stripes, polygons)",
        f"become a store; {scale.pretrain_steps} steps of {scale.batch} crops of {scale.crop} px train a",
        "small U-Net on it with the losses of train/configs/pretrain.yaml (MCC of the extent on whole scenes",
        f"held out: {benefit.pretrain_mcc:.3f}). The network is then",
        f"fine-tuned for {scale.tuning_steps} steps on {TRAINING_TILES - 1} synthetic Landsat-8 tiles of",
        f"{scale.tile_size} px, with pretrained weights and statistics or without, and `solution.py`",
        f"predicts {scale.test_tiles} tiles of other scenes. MCC over their pixels with data; same seeds,",
        "same steps.",
        "",
        "| fine-tuning | four classes | extent | four classes by seed |",
        "| --- | --- | --- | --- |",
    ]
    for variant in dict.fromkeys(score.variant for score in benefit.scores):
        four, extent = mean_of(benefit, variant)
        by_seed = ", ".join(f"{s.four_class:.3f}" for s in benefit.scores if s.variant == variant)
        yield f"| {variant.spell()} | {four:.3f} | {extent:.3f} | {by_seed} |"
    yield from ["", *_conclusion(benefit)]


def _conclusion(benefit: Benefit) -> list[str]:
    """Return what the table says: the best of each side against the other, whoever wins."""
    best = {}
    for pretrained in (True, False):
        variants = {score.variant for score in benefit.scores if score.variant.pretrained == pretrained}
        best[pretrained] = max((mean_of(benefit, variant)[0], variant) for variant in variants)
    gain = best[True][0] - best[False][0]
    return [
        f"Best with pretraining against best without, four classes: {gain:+.3f}",
        f"({best[True][1].spell()}, against {best[False][1].spell()}).",
        "Synthetic scenes of both kinds come from one generator: how much the real HKH helps on the real",
        "tiles, this cannot tell.",
    ]


def write_report(path: Path, benefit: Benefit, command: str) -> None:
    """Write the report, whole or not at all."""
    write_text(path, format_report(benefit, command))
    tqdm.write(f"{path} written", file=sys.stderr)
