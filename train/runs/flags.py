"""Flags of the commands: those of a training command, made from a dataclass, and those that other commands share.

Every field of the dataclass is an `option(...)` and becomes a flag, whose help gives the unit. Where several sources
give a value, the strongest wins: default < recipe and preset < saved settings (on resume) < flag.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from ccgpu.models.checkpoint import network_file
from ccgpu.models.image_files import MAX_PIXELS

S = TypeVar("S")
Decides = Literal["result", "records", "nothing"]
DEVICES = ("auto", "cpu", "cuda")


def add_checkpoint(parser: argparse._ActionsContainer) -> None:
    """Add --checkpoint, the file of a network, or the folder of a run."""
    parser.add_argument(
        "--checkpoint",
        type=checkpoint_file,
        required=True,
        metavar="FILE",
        help="a run folder, whose last.pt is read, another file of a run, or a published checkpoint",
    )


def checkpoint_file(text: str) -> Path:
    """Return the file that --checkpoint names: itself, or the last.pt of a run folder.

    Raises:
        argparse.ArgumentTypeError: a folder without one.
    """
    try:
        return network_file(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).partition(": ")[2]) from error


def add_device(parser: argparse._ActionsContainer) -> None:
    """Add --device."""
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where to run (default: auto)")


def add_max_pixels(parser: argparse._ActionsContainer) -> None:
    """Add --max-pixels, the largest image that is read."""
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help=f"largest image that is read, in pixels (default: {MAX_PIXELS})",
    )


def add_value_range(parser: argparse._ActionsContainer, default: str) -> None:
    """Add --value-range, the values of deep images that become black and white; its help ends with `default`."""
    parser.add_argument(
        "--value-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help=f"values that become black and white in images of more than 8 bits (default: {default})",
    )


def chosen_range(given: Sequence[float] | None, default: tuple[float, float] | None) -> tuple[float, float] | None:
    """Return the range of values that --value-range asks for, or `default` where it is left out.

    Raises:
        ValueError: the range is empty or infinite.
    """
    if given is None:
        return default
    low, high = given
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"--value-range must be LOW HIGH with LOW < HIGH, got {low:g} {high:g}")
    return low, high


def option(
    default: Any,
    help: str,
    *,
    group: str | None = None,
    unset: str | None = None,
    kind: Callable[[str], Any] = str,
    choices: Sequence[str] | None = None,
    count: str | int | None = None,
    metavar: str | tuple[str, ...] | None = None,
    least: float | None = None,
    most: float | None = None,
    decides: Decides = "result",
    bare: tuple[Any, ...] | None = None,
    excludes: tuple[str, ...] = (),
) -> Any:
    """Return a dataclass field that is a setting and a flag.

    Args:
        default: value that holds without flag, preset and saved run.
        help: one line with the unit.
        group: the group of flags in which the help shows this setting and the following ones; None: that of the setting
            before.
        unset: what a default of None or () means, for the help.
        kind: bool (--name and --no-name), or what turns a word into the value: int, float, str or another function.
        choices: the values allowed.
        count: argparse's nargs if the value is a tuple; "size" takes H W, or N for a square.
        metavar: name of the value in the help.
        least: smallest value allowed, for each number of a tuple.
        most: largest value allowed, for each number of a tuple.
        decides: what the setting changes, and so whether a resumed run may change it. "result": it changes the trained
            network, and a resumed run may not change it. "records": it changes the evaluation, and a run resumed in
            another folder may change it (the records of one folder must be comparable). "nothing": it changes neither,
            and any resumed run may change it.
        bare: the value of a flag without values, for a count of "*".
        excludes: the settings that have no effect beside this one: where it is given, their values of a recipe or of a
            saved run no longer hold (`without_excluded`).
    """
    metadata = {
        "help": help,
        "group": group,
        "unset": unset,
        "kind": kind,
        "choices": choices,
        "count": count,
        "metavar": metavar,
        "least": least,
        "most": most,
        "decides": decides,
        "bare": bare,
        "excludes": excludes,
    }
    return dataclasses.field(default=default, metadata=metadata)


class _Tuple(argparse.Action):
    """Store several values as a tuple, as a frozen dataclass needs them; without values, what `const` holds."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, tuple(values) or self.const or ())


class _Size(argparse.Action):
    """Store H W, or N for a square, as (height, width)."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if len(values) > 2:
            parser.error(f"argument {option_string}: expected H W, or N for a square, got {len(values)} numbers")
        setattr(namespace, self.dest, (values[0], values[-1]))


def add_flags(
    parser: argparse.ArgumentParser,
    settings: type,
    defaults: Mapping[str, Any],
    unset: Mapping[str, str] | None = None,
) -> dict[str, argparse._ArgumentGroup]:
    """Add a flag for each setting; the namespace has no attribute for a flag that the user leaves out.

    Args:
        parser: the parser to add to.
        settings: dataclass of `option`s.
        defaults: defaults by name that the help shows instead of the dataclass's own.
        unset: what None or () means, by name, where it is not what the `option` says; an empty text leaves the flag out
            of the help, because it has no effect.

    Returns:
        The groups of the help by title, to which more flags can be added.
    """
    own, groups = unset or {}, dict[str, argparse._ArgumentGroup]()
    adder: argparse._ActionsContainer = parser
    for field in dataclasses.fields(settings):
        m = field.metadata
        if m["group"] is not None:
            adder = groups.setdefault(m["group"], parser.add_argument_group(m["group"]))
        default, hidden = defaults.get(field.name, field.default), own.get(field.name) == ""
        shown = ("yes" if default else "no") if m["kind"] is bool else _shown(default)
        if default is None or default == ():
            shown = own.get(field.name) or m["unset"] or shown
        names = [flag(field.name)]
        common: dict[str, Any] = {
            "dest": field.name,
            "default": argparse.SUPPRESS,
            "help": argparse.SUPPRESS if hidden else f"{m['help']} (default: {shown})".replace("%", "%%"),
        }
        if m["kind"] is bool:
            adder.add_argument(*names, action=argparse.BooleanOptionalAction, **common)
        elif m["count"] == "size":
            adder.add_argument(*names, type=m["kind"], nargs="+", action=_Size, metavar="N", **common)
        elif m["count"] is not None:
            several = {"nargs": m["count"], "const": m["bare"], "metavar": m["metavar"]}
            adder.add_argument(*names, type=m["kind"], action=_Tuple, **several, **common)
        else:
            metavar = m["metavar"] or {int: "N", float: "X"}.get(m["kind"])
            adder.add_argument(*names, type=m["kind"], choices=m["choices"], metavar=metavar, **common)
    return groups


def _shown(value: Any) -> str:
    if isinstance(value, tuple) and value:
        return " ".join(str(part) for part in value)
    return "none" if value is None or value == () else str(value)


def range_problems(settings: Any) -> list[str]:
    """Return a line for each setting that is infinite, NaN or out of its range."""
    problems = []
    for field in dataclasses.fields(settings):
        least, most = field.metadata["least"], field.metadata["most"]
        value = getattr(settings, field.name)
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        if field.metadata["kind"] not in (int, float):
            continue
        too_low = least is not None and not all(number >= least for number in numbers)
        too_high = most is not None and not all(number <= most for number in numbers)
        bounds = [f"{least} or more"] * too_low + [f"at most {most}"] * too_high
        # Compared instead of passed to math.isfinite, which refuses large ints.
        if not bounds and not all(abs(number) < math.inf for number in numbers):
            bounds = ["finite"]
        if bounds:
            problems.append(f"{flag(field.name)} must be {' and '.join(bounds)}, got {_shown(value)}")
    return problems


def flag(name: str) -> str:
    """Return the flag of the setting `name`."""
    return "--" + name.replace("_", "-")


def saved_values(settings: type, saved: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the settings that a run saved by name, with lists as tuples, as JSON has no others.

    Args:
        settings: the dataclass.
        saved: the values in a checkpoint or in settings.json.
        source: where they come from, for the message.

    Raises:
        ValueError: there are other settings than this version's, or values of a wrong type.
    """
    known = {field.name: field for field in dataclasses.fields(settings)}
    if set(saved) != set(known):
        raise ValueError(
            f"{source} must have this version's settings, got a difference in {sorted(set(saved) ^ set(known))}; use "
            "the command that began it, in the version of ccgpu that wrote it."
        )
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    wrong = [f"{flag(name)} {value!r:.60}" for name, value in values.items() if not is_value(known[name], value)]
    if wrong:
        raise ValueError(
            f"{source} must hold settings of the right types, got {', '.join(wrong)}; the file was changed."
        )
    return values


def is_value(field: dataclasses.Field[Any], value: Any) -> bool:
    """Return whether a value of a setting, from a file or a recipe, is one that the setting's flag could have given."""
    m = field.metadata
    if value is None:
        return field.default is None
    if (m["count"] is not None) != isinstance(value, tuple):
        return False
    number = 2 if m["count"] == "size" else m["count"]
    if isinstance(number, int) and len(value) != number:
        return False
    kinds: dict[Any, tuple[type, ...]] = {bool: (bool,), int: (int,), float: (int, float)}
    for part in value if isinstance(value, tuple) else (value,):
        if type(part) not in kinds.get(m["kind"], (str,)):  # not isinstance: True is an int
            return False
        if m["choices"] is not None and part not in m["choices"]:
            return False
    return True


def changed_settings(
    settings: type, old: Mapping[str, Any], new: Mapping[str, Any], kept: Sequence[Decides]
) -> list[str]:
    """Return a line for each of the settings in `new` that differs from `old` and decides what must be kept."""
    decides = {field.name: field.metadata["decides"] for field in dataclasses.fields(settings)}
    return [
        f"{flag(name)} was {_shown(old[name])}, is {_shown(value)}"
        for name, value in new.items()
        if decides[name] in kept and old[name] != value
    ]


def combine(
    settings: type[S],
    *,
    preset: Mapping[str, Any],
    saved: Mapping[str, Any] | None,
    flags: Mapping[str, Any],
    kept: Sequence[Decides] = ("result", "records"),
) -> S:
    """Return the settings of a run: saved settings override the preset's, flags override both.

    Args:
        settings: the dataclass.
        preset: values of the preset chosen; empty without one.
        saved: all settings of the run to continue; None for a new run.
        flags: values of the flags the user gave.
        kept: which of the saved settings a flag may not change, by what they decide.

    Raises:
        ValueError: the saved run has settings of other names (another version) or types, or a flag differs from a saved
            setting that must not change; all such flags are listed, with old and new value.
    """
    if saved is None:
        return settings(**without_excluded(settings, {**preset, **flags}, flags))
    values = saved_values(settings, saved, "resume: the saved run")
    differing = changed_settings(settings, values, flags, kept)
    if differing:
        raise ValueError(
            f"resume: flags must equal the settings the run was started with, got: {'; '.join(differing)}; "
            "leave these flags out to continue the run, or start a new one in another --out."
        )
    return settings(**without_excluded(settings, {**values, **flags}, flags))


def without_excluded(settings: type, values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values, with the default of each setting that one of `given` excludes and that is not given itself.

    Args:
        settings: dataclass of `option`s.
        values: settings by name; `given` is part of them.
        given: those that a flag, or what else is stronger than the others, gave.
    """
    fields = {field.name: field for field in dataclasses.fields(settings)}
    kept = dict(values)
    for name, value in given.items():
        if value != fields[name].default:
            kept |= {other: fields[other].default for other in fields[name].metadata["excludes"] if other not in given}
    return kept
