"""Distillation: a network learns the averaged answers of trained ones, besides the labels.

Teachers answer each image once, in all views, and the means of their probabilities are kept in the fold's
folder while it is trained. Crops of them are cut, turned and warped exactly as image and labels are. The loss
is temperature^2 times the Kullback-Leibler divergence of the student from its teachers, both softened by the
temperature (Hinton et al. 2015, arXiv 1503.02531), besides the loss on the labels.

A network teaches a fold only if it never saw a tile that the fold holds out, so that the student's score on
them is as honest as its teachers'. A student of all tiles learns from all networks and has no score. About a
tile only those are asked that were not trained on it, where there are any: `python -m train fit --pairs`
makes networks that saw neither the tiles of a student's fold nor those of another one.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Callable, Iterable, NamedTuple, Optional, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from prep.files import write_array, write_json
from prep.labels import IGNORE
from prep.store import TileStore
from prep.synthetic.scenes import make_scene
from solution import (
    BANDS,
    CLASS_NAMES,
    LARGEST_TILE,
    Member,
    TileError,
    decide_classes,
    find_tiles,
    normalize,
    read_tile,
    valid_mask,
)
from train.config import Config, ConfigError, DistilConfig, to_dict
from train.data import (
    UNCHANGED,
    CropDataset,
    EpochSampler,
    FoldData,
    Indexed,
    Tile,
    open_fold,
    tile_normalization,
)
from train.fit import Recipe, RunError, first_normalization, fit_all
from train.module import SegmentationModule
from train.predict import as_member, predict_views, read_folds, scaled_for, usable_views
from train.run import FOLD_FILE, fold_folder
from train.submit.archive import sha256

ANSWERS_FOLDER = "teachers"  # of a fold: <source>-<tile>.npy, see `Answers`
IDENTITY_FILE = "identity.json"  # who answered what
CACHED_TILES = 64  # with their answers 22 MB each
SMALLEST = 1e-6  # probability: what float16 keeps of a mean is not less

if len(BANDS) != len(CLASS_NAMES) + 1:  # answers are cut as if they were bands
    raise AssertionError(f"{len(BANDS)} bands, expected one more than {len(CLASS_NAMES)} classes")


# --- Teachers -----------------------------------------------------------------------------------------------


class Teacher(NamedTuple):
    """A network of a finished run: its record and its file."""

    record: dict
    path: Path


def find_teachers(folders: Sequence[str], held_out: Sequence[str]) -> list[Teacher]:
    """Return the networks of some runs that never saw any of the tiles in `held_out`.

    Raises:
        RunError: a run has none, or is not finished.
    """
    teachers = []
    for folder in map(Path, folders):
        records = read_folds(folder)
        fit = [record for record in records if not set(record["train_tiles"]) & set(held_out)]
        if not fit:
            raise RunError(
                f"distil.teachers: each of the {len(records)} finished folds of {folder} was trained on some "
                f"of {', '.join(held_out)}, which the student holds out; finish the same fold there, or name "
                "a run of the same fold scheme"
            )
        teachers += [Teacher(record, fold_folder(folder, record["fold"]) / FOLD_FILE) for record in fit]
    return teachers


def ask(teachers: Sequence[tuple[Member, dict]], image: np.ndarray) -> np.ndarray:
    """Return the mean of the teachers' probabilities in all their views, and where they know anything.

    Args:
        teachers: members and their records.
        image: (H, W, 5) physical units, NaN where nodata.

    Returns:
        (H, W, 5) float16: four probabilities, then 1, or zeros where no band has a value.
    """
    passes = [
        predict_views(scaled_for(member, record, image), image, usable_views(record))
        for member, record in teachers
    ]
    probs = np.mean([views.mean(axis=0, dtype=np.float32) for views in passes], axis=0)  # (4, H, W)
    known = valid_mask(image)
    answers = np.zeros((*known.shape, len(BANDS)), np.float16)
    answers[known, : len(CLASS_NAMES)] = probs.transpose(1, 2, 0)[known]
    answers[known, -1] = 1
    return answers


# --- Images -------------------------------------------------------------------------------------------------


class Images(NamedTuple):
    """Images to ask the teachers about: what files are named by, and how one is read, (H, W, 5)."""

    names: list[str]
    read: Callable[[str], np.ndarray]


def unlabelled_images(folder: Path, held_out: Iterable[np.ndarray]) -> Images:
    """Return the images of a tile store, or of a folder with Band1 ... Band5, less those in `held_out`.

    Labels are not read. Images are compared by their pixels, whatever they are called.

    Raises:
        RunError: none is left, or one is too large for a single pass.
        prep.store.StoreError, solution.InputError: neither a store nor a folder of bands.
    """
    images = open_images(folder)
    unseen = {fingerprint(image) for image in held_out}
    kept = []
    for name in images.names:
        image = images.read(name)
        if max(image.shape[:2]) > LARGEST_TILE:
            raise RunError(
                f"distil.unlabelled: tile {name} of {folder} is {image.shape[1]} x {image.shape[0]} px, "
                f"expected {LARGEST_TILE} px or fewer a side; cut it into tiles"
            )
        if fingerprint(image) not in unseen and valid_mask(image).any():
            kept.append(name)
    if not kept:
        raise RunError(f"distil.unlabelled: no tile of {folder} is left besides those held out; name others")
    return Images(kept, images.read)


def open_images(folder: Path) -> Images:
    """Return the images of a tile store, or the readable ones of a folder with Band1 ... Band5."""
    if (folder / "store.json").is_file():
        store = TileStore(folder)
        return Images(list(store.tile_ids), store.image)
    files = {tile.tile_id: tile for tile in find_tiles(folder)}
    readable = []
    for name, tile in files.items():
        try:
            read_tile(tile)
            readable.append(name)
        except TileError as error:
            print(f"warning: {error}; it teaches nothing", flush=True)
    return Images(readable, lambda name: read_tile(files[name]))


def fingerprint(image: np.ndarray) -> int:
    """Return a number that images of the same pixels share."""
    return hash(np.nan_to_num(image).astype(np.float32).tobytes())


def synthetic_images(distil: DistilConfig, folder: Path) -> Images:
    """Return synthetic scenes, made once (seconds each) and kept in `folder` as <name>.npy."""

    def read(name: str) -> np.ndarray:
        path = folder / f"{name}.npy"
        if not path.is_file():
            scene = make_scene(distil.synthetic_seed, distil.synthetic_size, int(name.rpartition("-")[2]))
            write_array(path, scene.bands)
        return np.load(path)

    return Images([f"scene-{number}" for number in range(distil.synthetic)], read)


# --- Answers ------------------------------------------------------------------------------------------------


class Answers(Indexed[Tile]):
    """The teachers' answers to some tiles as tiles themselves, read when they are asked for.

    `values` are four probabilities and, where a band would be, 1; `weights` are 1 where they know anything.
    So crops of them are cut as crops of the five bands are.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Serve the answers in these files, (H, W, 5) float16."""
        self.paths = list(paths)
        self._read = lru_cache(maxsize=CACHED_TILES)(read_answers)

    def __len__(self) -> int:
        """Return the number of tiles."""
        return len(self.paths)

    def __getitem__(self, index: int) -> Tile:
        """Read one tile's answers."""
        return self._read(self.paths[index])


def read_answers(path: Path) -> Tile:
    """Return what `ask` said of an image, as a tile without labels."""
    values = np.load(path).astype(np.float32)
    weights = np.ascontiguousarray(np.broadcast_to(values[..., -1:], values.shape))
    return Tile(path.stem, values, weights, np.full(values.shape[:2], IGNORE, np.uint8))


class AnsweredTiles(Indexed[Tile]):
    """Images without labels as tiles, read when they are asked for; `codes` are what the teachers decide.

    The codes say which pixels crops are drawn around, and nothing else.
    """

    def __init__(self, images: Images, answers: Answers, normalization: dict, scaling: str) -> None:
        """Serve the images, scaled as the labelled ones are (`data.scaling`)."""
        self.images = images
        self.answers = answers
        self.normalization = normalization
        self.scaling = scaling
        self._read = lru_cache(maxsize=CACHED_TILES)(self._load)

    def __len__(self) -> int:
        """Return the number of tiles."""
        return len(self.images.names)

    def __getitem__(self, index: int) -> Tile:
        """Read one tile."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._read(index)

    def _load(self, index: int) -> Tile:
        name = self.images.names[index]
        image, answers = self.images.read(name), self.answers[index]
        normalization = tile_normalization(image, self.scaling, self.normalization)
        values = np.ascontiguousarray(normalize(image, normalization).transpose(1, 2, 0))
        decided = decide_classes(answers.values[..., : len(CLASS_NAMES)].transpose(2, 0, 1))
        codes = np.where(answers.values[..., -1] > 0, decided, np.uint8(IGNORE))
        return Tile(name, values, (~np.isnan(image)).astype(np.float32), codes, normalization)


def collect_answers(teachers: Sequence[Teacher], images: Images, folder: Path) -> Answers:
    """Ask the teachers about the images that `folder` has no answer to yet, and return all answers."""
    paths = {name: folder / f"answer-{name}.npy" for name in images.names}
    todo = [name for name, path in paths.items() if not path.is_file()]
    members = [(as_member(teacher.record), teacher.record) for teacher in (teachers if todo else ())]
    for name in tqdm(todo, desc=f"{len(members)} teachers", unit="tile", disable=not todo):
        write_array(paths[name], ask(impartial(members, name), images.read(name)))
    return Answers(list(paths.values()))


def impartial(members: Sequence[tuple[Member, dict]], tile: str) -> list[tuple[Member, dict]]:
    """Return the teachers that were not trained on a tile, all of them where there is none.

    One that was repeats the label, of which the student knows already; one that was not tells what can be
    known of it (cross-fitting).
    """
    return [one for one in members if tile not in one[1]["train_tiles"]] or list(members)


def require_same_teachers(teachers: Sequence[Teacher], config: Config, folder: Path) -> None:
    """Write who answers into `folder`; RunError where the answers in it are of others."""
    settings = to_dict(config)["distil"]
    kept = ("unlabelled", "synthetic", "synthetic_size", "synthetic_seed")
    identity = {
        "teachers": [sha256(teacher.path) for teacher in teachers],
        **{key: settings[key] for key in kept},
    }
    path = folder / IDENTITY_FILE
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != identity:
        raise RunError(
            f"{folder}: holds the answers of other teachers, or to other images; name another folder with "
            f"--run, or remove {folder.parent}"
        )
    write_json(path, identity)


# --- Crops --------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """Crops of some tiles, and the same crops of the answers to them. Labels count where `labelled`."""

    crops: CropDataset
    answers: CropDataset
    labelled: bool


def with_answers(crops: CropDataset, answers: Answers, labelled: bool) -> Source:
    """Return a source whose answers are cut, turned and warped as the crops are, and not jittered."""
    twin = copy.copy(crops)  # draws the same pixels by the same random numbers
    twin.tiles, twin.normalization = answers, UNCHANGED
    twin.augment = replace(crops.augment, gain=0.0, offset=0.0, illumination=0.0)
    return Source(crops, twin, labelled)


class TaughtCrops(Dataset):
    """Crops of several sources and the answers to them. An item depends on seed and index only."""

    def __init__(self, sources: Sequence[Source], shares: Sequence[float], seed: int) -> None:
        """Draw from each source by its share."""
        self.sources = list(sources)
        self.shares = np.asarray(shares, np.float64) / np.sum(shares)
        self.seed = seed

    def __len__(self) -> int:
        """Return the number of crops in an epoch."""
        return len(self.sources[0].crops)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int, Tensor]:
        """Return image (5, S, S), codes (S, S), the class drawn for, and answers (5, S, S) float32: four
        probabilities and 1, zeros where nothing is known."""
        rng = np.random.default_rng([self.seed, index, len(self.sources)])
        source = self.sources[int(rng.choice(len(self.sources), p=self.shares))]
        image, codes, of_class = source.crops[index]
        answers = source.answers[index][0]
        return image, codes if source.labelled else torch.full_like(codes, IGNORE), of_class, answers


# --- The loss -----------------------------------------------------------------------------------------------


def divergence(logits: Tensor, answers: Tensor, temperature: float) -> Tensor:
    """Return temperature^2 KL(teachers || student), the mean over the pixels with an answer; 0 without any.

    Both distributions are softened, p^(1 / temperature) renormalised; the square keeps gradients of the size
    that they have at temperature 1 (Hinton et al. 2015).

    Args:
        logits: (B, 4, H, W) of the student.
        answers: (B, 5, H, W), four probabilities and 1, or zeros where there is none.
        temperature: above 0.
    """
    known = answers[:, -1] > 0.5  # (B, H, W)
    if not known.any():
        return logits.float().sum() * 0.0
    taught = answers[:, :-1].movedim(1, -1)[known].float()  # (N, 4)
    target = (taught.clamp(min=SMALLEST).log() / temperature).log_softmax(dim=-1)
    found = (logits.movedim(1, -1)[known].float() / temperature).log_softmax(dim=-1)
    return temperature**2 * (target.exp() * (target - found)).sum(dim=-1).mean()


class StudentModule(SegmentationModule):
    """Trains a network on answers and labels; validated on labels as any other."""

    def batch_loss(self, logits: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        """Return the loss of a batch of TaughtCrops."""
        distil = self.config.distil
        loss = distil.kl * divergence(logits, batch[3], distil.temperature)
        if distil.supervised:
            loss = loss + distil.supervised * super().batch_loss(logits, batch)
        return loss


# --- All of it ----------------------------------------------------------------------------------------------


def open_student(config: Config, fold: int, folder: Path) -> FoldData:
    """Return a fold's tiles with crops that come with answers, which `folder` keeps.

    Raises:
        RunError: see `find_teachers`, `unlabelled_images` and `require_same_teachers`.
        train.data.DataError, prep.store.StoreError: the tiles cannot serve.
    """
    distil = config.distil
    data = open_fold(config, fold, first_normalization(config, fold))
    store = TileStore(config.data.store)
    teachers = find_teachers(distil.teachers, data.val_ids)
    answers_folder = folder / ANSWERS_FOLDER
    answers_folder.mkdir(parents=True, exist_ok=True)
    require_same_teachers(teachers, config, answers_folder)
    described = ", ".join(str(teacher.path.parent) for teacher in teachers)
    print(f"fold {fold}: taught by {described}", flush=True)

    answers = collect_answers(teachers, Images(data.train_ids, store.image), answers_folder)
    sources, shares = [with_answers(data.dataset, answers, labelled=True)], [distil.shares[0]]
    for share, images in zip(distil.shares[1:], further_images(config, data, store, answers_folder)):
        if share and images:
            answers = collect_answers(teachers, images, answers_folder)
            tiles = AnsweredTiles(images, answers, data.normalization, config.data.scaling)
            crops = CropDataset(tiles, data.normalization, config.data, config.augment, config.train.seed)
            sources.append(with_answers(crops, answers, labelled=False))
            shares.append(share)
    taught = TaughtCrops(sources, shares, config.train.seed)
    loader = DataLoader(
        taught,
        batch_size=config.data.batch_size,
        sampler=EpochSampler(len(taught)),
        num_workers=config.data.workers,
        persistent_workers=config.data.workers > 0,
    )
    return data._replace(train_loader=loader)


def further_images(
    config: Config, data: FoldData, store: TileStore, folder: Path
) -> tuple[Optional[Images], Optional[Images]]:
    """Return the unlabelled images and the synthetic ones that the config asks for, None for none."""
    distil = config.distil
    unlabelled, synthetic = None, None
    if distil.unlabelled and distil.shares[1]:
        found = unlabelled_images(Path(distil.unlabelled), map(store.image, data.val_ids))
        unlabelled = Images([f"unlabelled-{name}" for name in found.names], strip_prefix(found.read))
    if distil.shares[2]:
        synthetic = synthetic_images(distil, folder)
    return unlabelled, synthetic


def strip_prefix(read: Callable[[str], np.ndarray]) -> Callable[[str], np.ndarray]:
    """Return `read` for names with a prefix that tells their source."""
    return lambda name: read(name.partition("-")[2])


def fit_students(config: Config, run_dir: Path, folds: Optional[Sequence[int]] = None) -> list[dict]:
    """Train a student of each fold, by default all of the scheme, and return their records.

    `folds` [ALL_TILES] trains one on all tiles. Raises what `train.fit.fit_all` and `open_student` do, and
    ConfigError for a config without teachers.
    """
    if not config.distil.teachers:
        raise ConfigError(
            "distil.teachers is [], expected folders of finished runs, such as "
            "distil.teachers=[runs/imagenet-spatial]"
        )
    records = fit_all(config, run_dir, folds, Recipe(open_student, StudentModule))
    for record in records:  # what they were taught is of no more use, and larger than they are
        remove_answers(fold_folder(run_dir, record["fold"]) / ANSWERS_FOLDER)
    return records


def remove_answers(folder: Path) -> None:
    """Remove the answers in `folder`, which this module has made; who gave them stays on record."""
    for path in folder.glob("*.npy"):
        path.unlink()
