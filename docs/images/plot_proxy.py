"""Draw proxy.svg from the table of the proxy in docs/results.md.

python docs/images/plot_proxy.py
"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
ROW = re.compile(r"^\| `(?P<method>\w+)` \| (?P<mean>[\d.]+) ± (?P<deviation>[\d.]+) \|", re.MULTILINE)


def main() -> None:
    """Draw a point for each method, from the lowest to the highest, and a line at the student without a teacher."""
    text = (HERE.parent / "results.md").read_text()
    rows = {row["method"]: (float(row["mean"]), float(row["deviation"])) for row in ROW.finditer(text)}
    names = sorted(rows, key=lambda name: rows[name])
    means, deviations = zip(*(rows[name] for name in names), strict=True)
    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "proxy", "font.size": 10}
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axes.errorbar(means, names, xerr=deviations, fmt="o", capsize=4, color="#2b6cb0", ecolor="#9aa5b1")
    axes.axvline(rows["ce"][0], color="#c05621", linewidth=1, linestyle="--")
    axes.grid(axis="y", color="#e2e8f0")
    axes.set_xlabel("top-1 in percent after the last epoch, mean ± deviation of three seeds")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "proxy.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
