"""Packs a run's networks into `model.pth`, the one file that `solution.py` reads, and writes its card."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Mapping, Sequence

import torch
from torch import nn

from prep.files import sha256, write_text, write_whole
from prep.folds import KM2_PER_PIXEL
from prep.store import TileStore
from prep.text import markdown_table
from solution import (
    BANDS,
    CLASS_NAMES,
    MODEL_FORMAT,
    STRIDE,
    VIEWS,
    build_network,
    load_model,
    load_state,
    merge_batchnorms,
)
from train.config import Config, members_of, to_text
from train.data import folds_of_scheme
from train.kind import read_kind
from train.networks import network_class
from train.objective import code_names, score_intervals, score_tiles
from train.predict import predict_run, require_made_by
from train.report.scores import count_run
from train.run import ALL, FOLD_FILE, KIND_FOLDER, RunError, fold_folder, read_fold, read_folds, versions


def to_half(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights as float16; BatchNorm's statistics as they are, whose variances span more than it can hold."""
    return {
        name: tensor.half() if tensor.dtype == torch.float32 and "running_" not in name else tensor
        for name, tensor in state.items()
    }


def batchnorm_pairs(network: nn.Module) -> list[tuple[str, str]]:
    """Return names of convolutions and of the BatchNorms that alone read their outputs, as one pass shows them."""
    names = {module: name for name, module in network.named_modules()}
    outputs: list[tuple[torch.Tensor, nn.Module]] = []  # kept alive, so that no two of them share an id
    readers: dict[int, nn.Module] = {}
    hooks = [
        m.register_forward_hook(lambda conv, _, output: outputs.append((output, conv)))
        for m in network.modules()
        if isinstance(m, nn.Conv2d)
    ] + [
        m.register_forward_pre_hook(lambda bn, args: readers.__setitem__(id(args[0]), bn))
        for m in network.modules()
        if isinstance(m, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        network(torch.zeros(1, len(BANDS), 2 * STRIDE, 2 * STRIDE))
    for hook in hooks:
        hook.remove()
    return [(names[conv], names[readers[id(output)]]) for output, conv in outputs if id(output) in readers]


def mergeable_pairs(arch: Mapping, state: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Return the pairs that `solution.merge_batchnorms` may merge; none where that would change the answers."""
    network_class(arch["name"])
    network, merged = build_network(arch).eval(), build_network(arch).eval()
    for one in (network, merged):
        load_state(one, state, "packing")
    pairs = batchnorm_pairs(network)
    merge_batchnorms(merged, pairs)
    x = torch.randn(1, len(BANDS), 2 * STRIDE, 2 * STRIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = network(x), merged(x)
    same = torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    return [list(pair) for pair in pairs] if same else []


def stored_normalization(record: Mapping) -> dict[str, list[float]]:
    """Return the statistics of a fold's bands as plain numbers."""
    return {key: [float(value) for value in record["normalization"][key]] for key in ("mean", "std")}


def as_stored(record: Mapping, weight: float) -> dict[str, Any]:
    """Return a fold's record as a member of model.pth."""
    state = to_half(record["state_dict"])
    return {
        "arch": record["arch"],
        "weight": weight,
        "fold": record["fold"],
        "normalization": stored_normalization(record),
        "state_dict": state,
        "batchnorms": mergeable_pairs(record["arch"], state),
    }


def stored_members(run_dir: Path, config: Config, store: TileStore) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """Return the members of model.pth and the passes over them.

    First every network in one view, in the order of the recipe; then further views of members that have some.
    """
    members: list[dict[str, Any]] = []
    views: list[int] = []
    for name, (member, settings) in members_of(config).items():
        folder = run_dir / name
        records = [read_fold(fold_folder(folder, ALL) / FOLD_FILE)] if member.ship == "all" else read_folds(folder)
        for record in records:
            require_made_by(settings, store, record, folder)
        late = set(folds_of_scheme(store, settings.data.scheme)) - {record["fold"] for record in records}
        if late and member.ship != ALL:
            raise RunError(f"{folder}: fold {', '.join(map(str, sorted(late)))} not finished; train it with `fit`")
        members += [as_stored(record, member.weight / len(records)) for record in records]
        views += [member.views] * len(records)
    passes = [[number, view] for view in range(len(VIEWS)) for number in range(len(members)) if view < views[number]]
    return members, passes


def stored_kind(run_dir: Path, config: Config, store: TileStore) -> dict[str, Any]:
    """Return the network of the kind that was trained on all tiles, as model.pth holds it."""
    record = read_kind(config, store, fold_folder(run_dir / KIND_FOLDER, ALL) / FOLD_FILE)
    return {key: record[key] for key in ("arch", "fold", "state_dict")} | {
        "weight": 1.0,
        "normalization": stored_normalization(record),
        "batchnorms": [],
    }


def pack(run_dir: Path, config: Config, out: Path, command: str) -> Path:
    """Write `out` and its card from a finished run, and return the card's path.

    An older file at `out` is kept beside it as <name>.previous.pth.

    Raises RunError where a fold is missing or the file would be larger than `pack.max_mb`.
    """
    run_dir, out, store = Path(run_dir), Path(out), TileStore(config.data.store)
    members, passes = stored_members(run_dir, config, store)
    scores = scores_of(run_dir, config, store)
    content = {
        "format": MODEL_FORMAT,
        "members": members,
        "kind": stored_kind(run_dir, config, store),
        "passes": passes,
        "postprocess": vars(config.postprocess),
        "time_budget": config.pack.time_budget,
        "recipe": to_text(config),
        "provenance": provenance(store, command),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".packing")
    torch.save(content, partial)
    try:
        size = partial.stat().st_size / 1e6
        if size > config.pack.max_mb:
            raise RunError(f"{out}: would have {size:.1f} MB, expected pack.max_mb = {config.pack.max_mb:g} at most")
        load_model(partial)  # strictly, as the grader will
        if out.exists():
            previous = out.with_name(f"{out.stem}.previous{out.suffix}")
            out.replace(previous)
            print(f"{out} was there; it is now {previous}")
        write_whole(out, lambda path: partial.replace(path))
    finally:
        partial.unlink(missing_ok=True)
    card = out.with_name(f"{out.stem}_card.md")
    write_text(card, model_card(content, out, scores))
    return card


def provenance(store: TileStore, command: str) -> dict[str, Any]:
    """Return where a model comes from: tiles, what they show, fingerprint of their files, versions, command."""
    return {
        "tiles": store.tile_ids,
        "fingerprint": store.fingerprint,
        "labels": store.labels,
        "km2": {
            name: round(sum(tile.counts[name] for tile in store.tiles) * KM2_PER_PIXEL, 3) for name in code_names()
        },
        "bands": {key: [float(value) for value in store.stats[key]] for key in ("mean", "std")},
        "command": command,
        "versions": versions(),
    }


def scores_of(run_dir: Path, config: Config, store: TileStore) -> list[str]:
    """Return the lines of the card on out-of-fold scores, with their intervals."""
    predict_run(run_dir, config, store)
    counts = count_run(run_dir, store)
    rows = [
        [name, f"{found.value:.3f}", f"{found.low:.3f} to {found.high:.3f}"]
        for name, found in score_intervals(counts).items()
        if found
    ]
    everywhere = score_tiles(counts)["all_pixels"]
    for name, task in (("extent", "binary"), ("four-class", "four_class")):
        if everywhere[task]:
            rows.append([f"{name} MCC, nodata counted", f"{everywhere[task]['mcc']:.3f}", ""])
    return [markdown_table(["score", "value", "95 % interval"], rows)]


def model_card(content: Mapping, path: Path, scores: Sequence[str]) -> str:
    """Return the card in Markdown: what is packed, from what, how well it does, its limits."""
    about, members = content["provenance"], content["members"]
    labels = list(about["labels"].values())
    kinds = {text: labels.count(text) for text in ("phase1", "partial", "phase2")}
    networks = {f"{m['arch']['name']} {m['arch']['args']}" for m in members}
    areas = ", ".join(f"{name} {km2:.1f}" for name, km2 in about["km2"].items())
    recipe = hashlib.sha256(content["recipe"].encode()).hexdigest()[:12]
    steps = "\n".join(f"- {name}: {value}" for name, value in content["postprocess"].items())
    return f"""# Model card of {path.name}

{len(members)} networks of the extent in {len(content["passes"])} passes, and one of the kind of glacier.

- Networks: {"; ".join(sorted(networks))}; KindNet {content["kind"]["arch"]["args"]}
- Weights: SHA-256 `{sha256(path)}`
- Size: {path.stat().st_size / 1e6:.1f} MB (float16)
- Folds: {", ".join(str(m["fold"]) for m in members)}; a network of a fold has not seen the fold's tiles
- Tiles: {len(labels)} ({", ".join(about["labels"])}), fingerprint {about["fingerprint"]}
- Labels: {kinds["phase2"]} tiles tell both kinds of glacier, {kinds["partial"]} in part, {kinds["phase1"]} none
- Area, km²: {areas}
- Recipe: in the file itself (`recipe`, SHA-256 {recipe}); command: `{about["command"]}`
- Made with: {", ".join(f"{name} {version}" for name, version in about["versions"].items())}

## Scores, out of fold

Each tile by the networks that never saw it, valid pixels unless said otherwise; intervals by bootstrap over
blocks of 3 km. On ground that none of them has seen the file averages all its networks: that has no score here.

{chr(10).join(scores)}

## After the networks

{steps}
- time budget: {content["time_budget"]} s, in which as many passes are made as fit, at least one for each tile

## Limits

{chr(10).join(f"- {limit}" for limit in limits(content))}
"""


def limits(content: Mapping) -> list[str]:
    """Return what a model cannot be expected to do, from the tiles that it was made of."""
    about = content["provenance"]
    km2, mean, std = about["km2"], about["bands"]["mean"], about["bands"]["std"]
    look = f"{BANDS[0].name} {mean[0]:.2f} ± {std[0]:.2f}, {mean[-1]:.0f} ± {std[-1]:.0f} K"
    found = [
        f"Trained and scored on {len(about['tiles'])} tiles with {sum(km2.values()):.0f} km² of labelled pixels "
        f"({look}, mean ± deviation). On ground that looks otherwise, another season or region, it has no score.",
        f"Lakes are never predicted ({km2['lake']:.1f} km² in the labels): nothing here learns `{CLASS_NAMES[3]}`.",
        f"Debris is known from {km2['debris']:.1f} km² of labels; where it looks otherwise, expect less.",
    ]
    if not any(view for _, view in content["passes"]):
        found.append("Asked in one view: it expects north above and a morning sun, as in the tiles that it knows.")
    return found
