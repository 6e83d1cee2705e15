"""Maps names in a state dict to names of a model, and proposes a renaming that makes them match."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping

from fxtrain.core import first_names

Rename = Mapping[str, str | None] | Callable[[str], str | None] | None

# Parts of names added by wrappers: torch.compile, DDP and DataParallel, FSDP, activation checkpointing.
_WRAPPER_PARTS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def renamed(names: Iterable[str], rename: Rename) -> dict[str, str]:
    """Returns the new name of each name. Names that are renamed to None are left out.

    Args:
        names: Names in a state dict.
        rename: A mapping from old prefixes to new ones, of which the longest match applies, or a function of the name.

    Raises:
        ValueError: If a prefix of the mapping matches no name, or two names get the same new name.

    Example:
        >>> renamed(["module.head.bias", "module.body.bias"], {"module.": "", "module.head.": None})
        {'module.body.bias': 'body.bias'}
    """
    names = list(names)
    if rename is None:
        return {name: name for name in names}
    if isinstance(rename, Mapping):
        for prefix in rename:
            if not any(name.startswith(prefix) for name in names):
                raise ValueError(
                    f"expected rename to have prefixes of names in the state dict, got {prefix!r}. The names are "
                    f"{first_names(names)}."
                )
    changed = {name: rename(name) if callable(rename) else _replaced(name, rename) for name in names}
    found = {old: new for old, new in changed.items() if new is not None}
    twice = [new for new, count in Counter(found.values()).items() if count > 1]
    if twice:
        both = [old for old, new in found.items() if new == twice[0]]
        raise ValueError(
            f"expected rename to give distinct names, got {twice[0]!r} for each of {first_names(both)}. Rename all but "
            "one of them to None, which leaves them out."
        )
    return found


def proposed(names: Collection[str], given: Collection[str]) -> tuple[str, int] | None:
    """Finds the renaming with which the most names match.

    Args:
        names: Names of the model.
        given: Names in the state dict.

    Returns:
        The renaming as code, and the number of model names that match. None if no renaming matches more names than
        match without one.

    Example:
        >>> proposed(["weight", "bias"], ["module.weight", "module.bias"])
        ("rename={'module.': ''}", 2)
    """
    wanted = set(names)
    candidates: list[tuple[str, list[str]]] = []
    # Names are paired by their longest common suffix, as in "module.layers.0.bias" and "net.layers.0.bias". A suffix of
    # two names maps to None.
    by_suffix: dict[str, str | None] = {}
    for name in wanted:
        for end in _suffixes(name):
            by_suffix[end] = None if end in by_suffix else name
    by_suffix.update({name: name for name in wanted})
    prefixes: Counter[tuple[str, str]] = Counter()
    for name in given:
        for end in _suffixes(name):
            match = by_suffix.get(end)
            if match is not None:
                prefixes[name[: len(name) - len(end)], match[: len(match) - len(end)]] += 1
                break
    for (old, new), _ in prefixes.most_common(4):
        if old != new:
            candidates.append((f"rename={{{old!r}: {new!r}}}", [_replaced(name, {old: new}) or "" for name in given]))
    for part in _WRAPPER_PARTS:
        if any(f".{part}" in name for name in given):
            code = f"rename=lambda name: name.replace({part!r}, '')"
            candidates.append((code, [name.replace(part, "") for name in given]))
    fitting = [(code, len(wanted.intersection(new))) for code, new in candidates if len(set(new)) == len(new)]
    best = max(fitting, key=lambda candidate: candidate[1], default=None)
    return best if best is not None and best[1] > len(wanted.intersection(given)) else None


def _replaced(name: str, prefixes: Mapping[str, str | None]) -> str | None:
    longest = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default=None)
    if longest is None:
        return name
    new = prefixes[longest]
    return None if new is None else new + name[len(longest) :]


def _suffixes(name: str) -> list[str]:
    """Returns the suffixes of a name that start at a part of it, the longest (the name) first."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]
