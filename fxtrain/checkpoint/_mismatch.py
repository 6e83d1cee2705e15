"""The error message for a checkpoint that does not fit the tree it is restored into."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Sequence

import torch

from fxtrain.checkpoint._leaf_parts import Names, Part
from fxtrain.core import first_names

_SHOWN_PATHS = 20
_SHOWN_NAMES = 6
_LORA = "lora_"  # in the names of all parameters that peft adds


def mismatch_message(
    path: pathlib.Path,
    names: Names,
    selected: Iterable[Part],
    unlike: Sequence[tuple[Part, str, Part | None]],
    left_over: Sequence[Part],
) -> str:
    """Returns the error message for parts that differ, with remedies for these differences.

    Args:
        path: The checkpoint's folder.
        names: The parameters and buffers of both sides.
        selected: The parts selected for restoring.
        unlike: The selected parts without a source of the same shape and dtype, as triples of the part, its path in
            the checkpoint, and the source or None.
        left_over: The parts of the checkpoint that the tree lacks.
    """
    problems: list[str] = []
    for part, target, source in unlike:
        at = "" if target == part.path else f" at {target}"
        problems.append(f"  {part.path}: expected {part.kind}, got {source.kind if source else 'none'}{at}")
    problems += [f"  {part.path}: expected none, got {part.kind}" for part in left_over]
    more = f"\n  ... and {len(problems) - _SHOWN_PATHS} more" if len(problems) > _SHOWN_PATHS else ""
    shown = "\n".join(problems[:_SHOWN_PATHS])
    missing = [part for part, _, source in unlike if source is None]
    differing = [*(part for part, _, _ in unlike), *left_over]
    remedies = [
        *_lora_remedies(names),
        *_dtype_remedies(unlike, left_over),
        *_trainable_remedies(names, missing, left_over),
        *_fresh_remedies(names, selected, differing),
        *_slot_remedies(names, differing),
    ] or ["Create `like` with the same model, optimizer and callbacks as the checkpoint."]
    return (
        f"expected the paths, shapes and dtypes of `like`, got others in {path}:\n{shown}{more}\n{' '.join(remedies)} "
        "Use where= to restore a part, or to take values from other paths."
    )


def _lora_remedies(names: Names) -> list[str]:
    here, there = (any(_LORA in name for name in side.values()) for side in (names.here, names.there))
    if here == there:
        return []
    adapted = "the checkpoint" if there else "`like`"
    way = (
        "Restore it into a state of the adapted model. fxtrain.save_weights(..., convert=lambda model: "
        "model.merge_and_unload()) then writes the merged weights for fxtrain.load_weights."
        if there
        else "Create `like` without adapters, and load its weights into the adapted model with fxtrain.load_state_dict."
    )
    return [f"Only {adapted} has LoRA parameters. {way}"]


def _dtype_remedies(unlike: Sequence[tuple[Part, str, Part | None]], left_over: Sequence[Part]) -> list[str]:
    """Returns the remedy if only dtypes differ, as those of a model in another precision."""
    kinds = [(part.kind.split("["), source.kind.split("[")) for part, _, source in unlike if source is not None]
    if left_over or len(kinds) < len(unlike) or any(here[1:] != there[1:] for here, there in kinds):
        return []
    dtype = kinds[0][1][0]
    if all(part.slot is not None for part, _, _ in unlike) or not getattr(torch, dtype).is_floating_point:
        return []
    return [
        f"Only dtypes differ. Create `like` with fxtrain.init(..., dtype=torch.{dtype}), restore it, and pass "
        "fxtrain.state_dict of the result to fxtrain.load_state_dict(..., cast=True)."
    ]


def _slot_remedies(names: Names, differing: Iterable[Part]) -> list[str]:
    """Returns the remedy if only slots differ, in values such as a vector of statistics over all parameters."""
    slots = {part.slot for part in differing if names.of(part) is None}
    if not slots or None in slots:
        return []
    return [
        f"To initialize {first_names(sorted(map(repr, slots)), _SHOWN_NAMES)}, restore into a state without these "
        "slots, with extra='drop', and attach the callbacks to the result."
    ]


def _trainable_remedies(names: Names, missing: Sequence[Part], left_over: Sequence[Part]) -> list[str]:
    """Returns the remedy if both sides have the same parameters but train different ones."""
    one_sided = [*missing, *left_over]
    both = {*names.here.values()} & {*names.there.values()}
    if not one_sided or any(part.keys[:1] != ("opt_state",) or names.of(part) not in both for part in one_sided):
        return []
    held = [
        f"only {side} has optimizer state for {first_names(sorted(own), _SHOWN_NAMES)}"
        for side, parts in (("`like`", missing), ("the checkpoint", left_over))
        if (own := {name for part in parts if (name := names.of(part))})
    ]
    return [
        f"Different parameters are trainable: {', and '.join(held)}. Create `like` with the trainable parameters of "
        "the checkpoint, using fxtrain.with_trainable(like, tx, ...), restore it, and then change them."
    ]


def _fresh_remedies(names: Names, selected: Iterable[Part], differing: Iterable[Part]) -> list[str]:
    """Returns the remedy if some parameters fit, together with their optimizer state and averages."""
    unfit = {name for part in differing if (name := names.of(part))}
    fit = {name for part in selected if (name := names.of(part))} - unfit
    weights = {*names.here.values()} & {*names.there.values()} & fit
    if not weights or not unfit:
        return []
    code = "[" + ", ".join(map(repr, sorted(unfit)[:_SHOWN_NAMES])) + (", ...]" if len(unfit) > _SHOWN_NAMES else "]")
    return [f"Use fresh={code}, or patterns of these names, to keep them as in `like`, with their optimizer state."]
