"""What the compiler's estimate of a latency is worth, and what AI Hub publishes; the table and picture of many of them.

AI Hub's figures are read from the perf.yaml files that the installed qai_hub_models brings along; none is written here.
"""

import json
import math
from pathlib import Path

import common

from aihub import service

from . import compiler

DEVICE, DEVICE_SOC = "Dragonwing IQ-9075 EVK", 77
PUBLISHED_DEVICES = {77: DEVICE, 52: "SA8255P ADP"}  # whose chips have an estimate, too
# A device's latency over the estimate, the lowest and the highest that were seen: by AI Hub's published figures of
# r2plus1d_18, r3d_18 and mc3_18 (w8a16: of mc3_18 alone), and by those that teams measured for the sample solution
# (21.5 ms; w8a8: 4.49 ms).
DEVICE_OVER_ESTIMATE = {"float": (0.94, 1.11), "w8a8": (0.80, 1.00), "w8a16": (0.70, 1.11)}
# The networks above have up to 2; a transformer with 80 was said to take 330 ms, and takes 10.
MANY_OPS_WITHOUT_COST = 5
PUBLISHED_AS = {"r2plus1d_18": "resnet_2plus1d", "r3d_18": "resnet_3d", "mc3_18": "resnet_mixed"}
PUBLISHED_FRAMES = 16
COLOURS = {"float": "tab:blue", "w8a8": "tab:orange", "w8a16": "tab:green"}  # of each precision in the picture


def published_latencies(network, precision, frames):
    """{device: (ms, QAIRT version)} that AI Hub publishes for a network's QNN model, {} where it publishes none."""
    import importlib.resources

    import yaml

    if network not in PUBLISHED_AS or frames != PUBLISHED_FRAMES:
        return {}
    file = importlib.resources.files("qai_hub_models") / "models" / PUBLISHED_AS[network] / "perf.yaml"
    found = {}
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        (component,) = content["precisions"][precision]["components"].values()
        for device, runtimes in component["performance_metrics"].items():
            run = runtimes.get("qnn_dlc") or {}
            if run.get("inference_time_milliseconds"):
                qairt = (run.get("tool_versions") or {}).get("qairt", "unknown")
                found[device] = (run["inference_time_milliseconds"], qairt)
    except (OSError, KeyError, ValueError, TypeError, AttributeError, yaml.YAMLError):  # another version of the package
        return {}
    return found


def bounds_ms(estimated_ms, precision):
    """(low, high) between which a device is expected: the compiler's own bounds, and the errors that were seen."""
    low, estimate, high = estimated_ms
    smallest, largest = DEVICE_OVER_ESTIMATE[precision]
    return min(low, smallest * estimate), max(high, largest * estimate)


def verdict(figures, precision):
    """On the 34 ms gate: "meets", "misses", "too close to call" or, without an estimate to be trusted, "not known".

    `figures` are of a chip `soc`; the gate is the Dragonwing IQ-9075's.
    """
    voters = (figures.get("network") or "").count(" + ") + 1
    too_many = (figures["ops_without_cost"] or 0) > MANY_OPS_WITHOUT_COST * voters
    if not figures["estimated_ms"] or too_many or figures["soc"] != DEVICE_SOC:
        return "not known"
    low, high = bounds_ms(figures["estimated_ms"], precision)
    if high < service.LATENCY_GATE_MS:
        return "meets"
    return "misses" if low > service.LATENCY_GATE_MS else "too close to call"


def print_latency(figures, network, precision, frames, soc):
    """Print the estimate, what AI Hub publishes for the same network, and the verdict."""
    published = published_latencies(network, precision, frames)
    if not figures["estimated_ms"]:
        print("estimate  none: the compiler has no model of time for this chip")
        known = ", ".join(f"{number} ({compiler.SOCS[number]})" for number in compiler.SOCS_WITH_ESTIMATE)
        print(f"          SoC numbers with one: {known}")
        for device, (milliseconds, qairt) in sorted(published.items()):
            print(f"published {milliseconds:.2f} ms by AI Hub on {device}, QAIRT {qairt}")
        return
    low, estimate, high = figures["estimated_ms"]
    print(f"estimate  {estimate:.2f} ms ({low:.2f} to {high:.2f}) by Qualcomm's compiler; no device was asked")
    device = PUBLISHED_DEVICES.get(soc)
    if device in published:
        milliseconds, qairt = published[device]
        off = 100 * (estimate / milliseconds - 1)
        print(f"published {milliseconds:.2f} ms by AI Hub on {device}, QAIRT {qairt}; the estimate is {off:+.0f} % off")
    if soc != DEVICE_SOC:
        return
    said, (low, high) = verdict(figures, precision), bounds_ms(figures["estimated_ms"], precision)
    if said == "not known":
        print(f"verdict   none: {figures['ops_without_cost']} operations have no known cost, the estimate is worthless")
        return
    words = {"meets": "meets the", "misses": "MISSES the", "too close to call": "too close to call: the"}[said]
    gate = f"{words} {service.LATENCY_GATE_MS} ms gate"
    print(f"verdict   {gate}: {low:.1f} to {high:.1f} ms, by the compiler's own bounds")
    smallest, largest = (100 * (ratio - 1) for ratio in DEVICE_OVER_ESTIMATE[precision])
    print(f"          and the devices seen so far, {smallest:+.0f} to {largest:+.0f} % off their {precision} estimates")


def measured(seconds, description, is_native):
    """What runs of a binary took, in words, beside the gate and the compiler's estimate; "" without runs.

    seconds: of each run. description: as compile_offline.py writes it. is_native: on a chip, not in the emulator.
    """
    import numpy as np

    if not seconds:
        return ""
    median, high = (1000 * float(value) for value in np.percentile(seconds, (50, 95)))
    estimate = description.get("estimated_ms")
    low, middle, most = estimate or (0, 0, 0)
    said = f"; the compiler's estimate is {middle:.2f} ms ({low:.2f} to {most:.2f})" if estimate else ""
    if not is_native:
        return f"latency   {median / 1000:.1f} s a clip in the emulator, which says nothing about the chip's{said}"
    gate = service.LATENCY_GATE_MS
    words = "meets" if high < gate else "MISSES" if median > gate else "too close to call:"
    return (
        f"latency   {median:.2f} ms, the median of {len(seconds):,} clips, {high:.2f} ms the 95th percentile, after "
        f"warm-up: {words} the {gate} ms gate{said}"
    )


# --- many of them -----------------------------------------------------------------------------------------------------


def read_results(results):
    """{(network, frames, precision): Top-1 in percent} of `network/frames/precision=` a report.json or a number.

    Exits with code 2 and one sentence for anything else.
    """
    accuracies = {}
    for result in results:
        try:
            name, _, value = result.partition("=")
            network, frames, precision = name.split("/")
            if value.endswith(".json"):
                value = json.loads(Path(value).read_text(encoding="utf-8"))["figures"]["top1"]
            accuracies[network, int(frames), precision] = float(value)
        except (OSError, ValueError, KeyError, TypeError) as e:
            common.refuse(f"{result!r} in results is not as r2plus1d_18/16/float=report/report.json or …=89.6 ({e!r})")
    return accuracies


def summarise(rows, accuracies, picture):
    """Sort the rows, print the table, draw the picture; returns (figures, exit code: 1 if something did not compile).

    A row has network, frames, precision, soc, and the figures of compiler.compiling, or `error`.
    """
    for row in rows:
        key = (row["network"], row["frames"], row["precision"])
        published = published_latencies(row["network"], row["precision"], row["frames"])
        row["published_ms"] = published.get(PUBLISHED_DEVICES.get(row["soc"]), (None,))[0]
        row["top1"] = accuracies.get(key)
        row["gate"] = "not known" if "error" in row else verdict(row, row["precision"])
    rows = sorted(rows, key=lambda row: row["estimated_ms"][1] if row.get("estimated_ms") else math.inf)
    print_table(rows)
    drawn = draw_picture(rows, picture)
    failed = sum("error" in row for row in rows)
    compiled = f"{len(rows)} networks: {len(rows) - failed} compiled, {failed} refused"
    print(f"\n{compiled}" + (f"; picture {picture}" if drawn else ""))
    kept = ("network", "frames", "precision", "estimated_ms", "bytes", "ops_without_cost", "qairt", "gate",
            "published_ms", "top1", "error")  # fmt: skip
    return {"networks": [{name: row[name] for name in kept if name in row} for row in rows]}, 1 if failed else 0


def print_table(rows):
    """Print the rows of a comparison, fastest first; what did not compile comes last, with its reason."""
    print(f"\n{'network':<13}{'frames':>6}  {'precision':<9}{'ms':>7}  {'low':>6}{'high':>7}  {'gate':<18}{'MB':>6}"
          f"{'no cost':>9}{'AI Hub, ms':>12}{'Top-1, %':>10}")  # fmt: skip
    for row in rows:
        head = f"{row['network']:<13}{row['frames']:>6}  {row['precision']:<9}"
        if "error" in row:
            print(f"{head}does not compile: {row['error']}")
            continue
        times = f"{'none':>7}  {'':>13}"
        if row["estimated_ms"]:
            low, estimate, high = row["estimated_ms"]
            times = f"{estimate:>7.2f}  {low:>6.2f}{high:>7.2f}"
        published = f"{row['published_ms']:.2f}" if row["published_ms"] else ""
        top1 = f"{row['top1']:.1f}" if row["top1"] is not None else ""
        print(f"{head}{times}  {row['gate']:<18}{row['bytes'] / 1e6:>6.1f}{row['ops_without_cost'] or 0:>9}"
              f"{published:>12}{top1:>10}")  # fmt: skip


def draw_picture(rows, path):
    """Draw the latencies of sorted rows against the gate, and latency against accuracy where that is known.

    Returns whether there was anything to draw.
    """
    from matplotlib.figure import Figure  # without pyplot no display is ever looked for

    rows = [row for row in rows if row.get("estimated_ms")]
    if not rows:
        return False
    known = [row for row in rows if row["top1"] is not None]
    figure = Figure(figsize=(11 if known else 7, 1.2 + 0.26 * len(rows)), layout="constrained")
    axes, *others = figure.subplots(1, 2 if known else 1, squeeze=False)[0]
    for place, row in enumerate(rows):
        low, estimate, high = row["estimated_ms"]
        axes.plot([low, high], [place, place], color=COLOURS[row["precision"]], linewidth=5, alpha=0.35)
        axes.plot(estimate, place, "o", color=COLOURS[row["precision"]], markersize=5)
        axes.annotate(f"{estimate:.1f}", (high, place), (5, 0), textcoords="offset points", va="center", fontsize=8)
        if row["published_ms"]:
            axes.plot(row["published_ms"], place, "x", color="black", markersize=6)
    axes.set_yticks(range(len(rows)), [f"{row['network']}, {row['frames']} frames, {row['precision']}" for row in rows])
    axes.tick_params(labelsize=8)
    axes.invert_yaxis()
    set_latency_axis(axes, rows)
    for precision in sorted({row["precision"] for row in rows}):
        axes.plot([], [], "o", color=COLOURS[precision], label=f"estimate, {precision}")
    if any(row["published_ms"] for row in rows):
        axes.plot([], [], "x", color="black", label="AI Hub's published figure")
    axes.legend(fontsize=8, loc="lower left")
    if known:
        draw_accuracies(*others, known)
    with common.written_then_renamed(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    return True


def set_latency_axis(axes, rows):
    """A logarithmic axis in ms, with the gate."""
    shown = [1, 2, 5, 10, 20, 34, 50, 100, 200, 500]
    largest = max(service.LATENCY_GATE_MS, *(row["estimated_ms"][2] for row in rows))
    smallest = min(row["estimated_ms"][0] for row in rows)
    axes.set(xscale="log", xlim=(0.8 * smallest, 1.5 * largest))
    ticks = [tick for tick in shown if math.floor(smallest) <= tick <= largest]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.axvline(service.LATENCY_GATE_MS, color="tab:red", linewidth=1, linestyle="--")
    device = PUBLISHED_DEVICES.get(rows[0]["soc"], rows[0]["chip"])
    axes.set_xlabel(f"estimated latency on {device}, ms (dashed: {service.LATENCY_GATE_MS} ms)", fontsize=8)


def draw_accuracies(axes, rows):
    """Top-1 over latency of the rows whose result is known."""
    for row in rows:
        axes.plot(row["estimated_ms"][1], row["top1"], "o", color=COLOURS[row["precision"]])
        axes.annotate(f"{row['network']}, {row['frames']} frames", (row["estimated_ms"][1], row["top1"]), (5, 4),
                      textcoords="offset points", fontsize=8)  # fmt: skip
    set_latency_axis(axes, rows)
    axes.tick_params(labelsize=8)
    axes.set_ylabel("Top-1, %", fontsize=8)
    axes.margins(y=0.2)
