"""The plan and the profile as a user reads them: tables, what limits the run, what the figures rest on."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from ..config import Config, differing_keys
from .measured import COMPUTED, Profile
from .plan import BEFORE, DAY, JUDGE_SECONDS, MERGE_SECONDS, PICTURES, Plan, code_of, counted_for, judged_wrong
from .settings import GIB, Settings


def advice(made: Plan, config: Config) -> list[str]:
    """Does it fit, what is the bottleneck, what to change."""
    device, need = made.settings.device, sum(made.memory.values())
    notes = []
    if need > device.memory:
        largest = max(made.memory, key=lambda name: made.memory[name])
        remedy = {
            "activations": "lower training.micro_batch_size (the numbers stay the same)",
            "bank": "lower objective.bank_size",
            "features of the batch": "set objective.exchange: ring, or lower training.batch_size",
            "vocabulary logits": "lower mlm.texts_per_batch",
        }.get(largest, "raise ZeRO's stage in the DeepSpeed JSON, or offload the optimiser")
        notes.append(f"does not fit: {need / GIB:.1f} of {device.memory / GIB:.0f} GiB; most is {largest}: {remedy}")
    else:
        notes.append(f"fits: {need / GIB:.1f} of {device.memory / GIB:.0f} GiB on each device")
    label, rate = list(made.rates.items())[-1]
    parts = made.parts(rate)
    slowest = max(parts, key=lambda name: parts[name])
    notes.append(f"most time {label}: {slowest}, {parts[slowest] / sum(parts.values()):.0%}")
    if slowest in ("gradients between devices", "communication"):
        notes.append("a larger training.batch_size exchanges gradients less often")
    training = made.days(rate, before=False) * DAY
    notes.append(f"the loader must give {made.visits / training:,.0f} pairs a second, over all devices")
    if PICTURES in parts:
        pictures = made.settings.images / parts[PICTURES]
        notes.append(f"the frozen tower takes {pictures:,.0f} pictures a second, which `prepare` must read and decode")
    if made.settings.profile is not None:
        notes += _profiled(made, config, made.settings.profile)
    if config.confidence.selection == "calibrated":
        share = config.confidence.cross_fit_share
        notes.append(f"cross-fit comes before: two towers, {share:.0%} of the visits in all, of captions alone")
    if config.model.start_from is not None:
        notes.append(f"the start, {config.model.start_from}, is a run of its own: plan it too")
    return notes


def _profiled(made: Plan, config: Config, profile: Profile) -> list[str]:
    """What the profile measured, and how far it is from the plan."""
    whole = profile.step_seconds
    notes = [
        f"measured: {profile.parts['data wait'] / whole:.1%} of a step waits for data,"
        f" {profile.parts['communication'] / whole:.1%} for other ranks",
        f"measured: {_short(profile.flop_per_second)}FLOP/s of each device,"
        f" {_short(profile.flop_per_second_computing)}FLOP/s while it computes",
    ]
    peak, counted = profile.peak_bytes / GIB, counted_for(profile) / GIB
    notes.append(
        f"measured: {peak:.2f} GiB at most in the profile, {counted:.2f} counted for it; what it held beyond is added"
    )
    free = ("run", "training.pair_visits", "training.validate_every", "training.checkpoint_every", "data.store")
    changed = [key for key in differing_keys(profile.settings, config) if key not in free]
    if changed:
        notes.append(f"the profile was of another config: {', '.join(changed[:5])} differ; its rates may not hold")
    return notes


def plan_tables(made: Plan) -> list[Table]:
    """Time, memory and storage as tables, and the code that their terms stand for."""
    rates = made.rates
    parts = [made.parts(rate) for rate in rates.values()]
    time = Table("", "operations", *rates, title=f"time on {made.settings.machine}")
    for name in parts[0]:
        flop = f"{made.flop[name]:.2e}" if name in made.flop else ""
        time.add_row(name, flop, *(_span(seconds[name]) for seconds in parts))
    if any(name in made.flop for name in BEFORE):
        alone = [made.days(rate, before=False) for rate in rates.values()]
        time.add_row("training", "", *(_span(days * DAY) for days in alone), style="bold")
    days = [made.days(rate) for rate in rates.values()]
    time.add_row("in all", f"{sum(made.flop.values()):.2e}", *(_span(day * DAY) for day in days), style="bold")
    device_days = [made.device_days(rate) for rate in rates.values()]
    label = "device-days" if made.settings.profile else "GPU-days"
    time.add_row(label, "", *(f"{days:.2f}" for days in device_days), style="bold")
    memory = Table("", "GiB", title="memory of each device")
    for name, size in made.memory.items():
        memory.add_row(name, f"{size / GIB:.2f}")
    memory.add_row("in all", f"{sum(made.memory.values()) / GIB:.2f}", style="bold")
    storage = Table("", "GiB", title="store")
    for name, size in made.storage.items():
        storage.add_row(name, f"{size / GIB:.1f}")
    terms = Table("", "efficientclip", title="what the terms stand for")
    for name in dict.fromkeys([*parts[0], *made.memory]):
        if (code := code_of(name)) is not None:
            terms.add_row(name, code)
    return [time, memory, *([storage] if made.storage else []), terms]


def assumptions(settings: Settings, config: Config) -> Sequence[str]:
    """What the figures rest on."""
    device, profile, precision = settings.device, settings.profile, config.training.precision
    data = (
        f"{settings.pairs:,} pairs on {settings.images:,} pictures; captions of {settings.caption_tokens:.1f} tokens,"
        f" unpaired texts of {settings.text_tokens:.1f}, no padding computed"
    )
    if profile is None:
        return (
            data,
            f"{device.name}: {device.peak_in(precision) / 1e12:.0f} TFLOP/s dense {precision},"
            f" {device.memory / GIB:.0f} GiB, {device.bandwidth / 1e12:.2f} TB/s,"
            f" {settings.link / 1e9:.0f} GB/s between devices, {device.host / 1e9:.0f} GB/s to the host,"
            " by the data sheet",
            f"a core puts the store together at {1e6 * MERGE_SECONDS:.0f} µs a pair and judges at"
            f" {1e6 * JUDGE_SECONDS:.0f}, as measured here; there is one for each device",
            "gradients are exchanged without overlap; the host keeps up: data, ECL's table and Python cost no time, nor"
            " does validation (a profile measures them)",
        )
    resident = ("malloc gives nothing back between steps: the resident set grows a little after those of the profile",)
    unknown = ("as if no pair were dropped: what the selection drops is not known before",)
    judged = config.confidence.selection == "calibrated" and judged_wrong(config) == 0
    return (
        data,
        f"rates and seconds as on {profile.world_size} rank(s) of {profile.hardware.get('machine', profile.device)},"
        f" {profile.steps_measured} steps of {profile.config}",
        "every validation is the best so far, and so saves a checkpoint; pictures run at the text tower's rate",
        *(resident if profile.base_bytes else ()),
        *(unknown if judged or config.confidence.selection == "mixture" else ()),
    )


def profile_tables(made: Profile) -> list[Table]:
    """Time of a step by part, and the rates, as tables."""
    low, high = made.step_seconds_range
    time_ = Table("part", "ms", "share", title=f"a step of {made.pairs_per_step:,} pairs on {made.world_size} rank(s)")
    for part, seconds in made.parts.items():
        time_.add_row(part, f"{1000 * seconds:.1f}", f"{seconds / made.step_seconds:.1%}")
    time_.add_row("in all", f"{1000 * made.step_seconds:.1f}", "", style="bold")
    time_.add_row(
        f"of {made.steps_measured} steps, median", f"{1000 * made.step_seconds_median:.1f}",
        f"{1000 * low:.1f} to {1000 * high:.1f} ms",
    )  # fmt: skip
    rates = Table("", "", title=str(made.hardware["machine"]))
    rates.add_row("pairs a second", f"{made.pairs_per_step / made.step_seconds:,.0f}")
    rates.add_row("tokens a second", f"{made.tokens_per_step / made.step_seconds:,.0f}")
    rates.add_row("operations a second of each device", _short(made.flop_per_second))
    rates.add_row(f"the same while it computes ({', '.join(COMPUTED)})", _short(made.flop_per_second_computing))
    for name, flop in made.flop_per_step.items():
        rates.add_row(f"operations of a step: {name}", _short(flop))
    rates.add_row("peak memory of a rank", f"{made.peak_bytes / GIB:.2f} GiB")
    for name, seconds in made.once.items():
        rates.add_row(f"{name}, once", f"{seconds:.2f} s")
    return [time_, rates]


def _span(seconds: float) -> str:
    for size, unit in ((DAY, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _short(value: float) -> str:
    """A large number with the sign of its power: 1.23 T."""
    for size, sign in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {sign}"
    return f"{value:.3g} "
