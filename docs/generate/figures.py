"""`python -m docs.generate.figures`: draws the figures of docs/concepts.md into docs/images/."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from mmjax.config import SOFTMAX, ModelConfig
from mmjax.layers.lightning import decay_rates

IMAGES = Path(__file__).parents[1] / "images"
M1 = ModelConfig.minimax_m1()


def head_memory(ax: Axes) -> None:
    """1/s of each head, for some layers of M1."""
    rates = decay_rates(M1.num_heads, M1.num_layers)
    for layer in (0, 40, 70, 78):
        ax.semilogy(range(1, M1.num_heads + 1), 1 / rates[layer], label=f"layer {layer}")
    ax.set(xlabel="head", ylabel="1/s, tokens", title="Memory of a head in MiniMax-M1")
    ax.legend()


def sequence_bytes(ax: Axes) -> None:
    """What one sequence of M1 leaves in the caches, against its length."""
    tokens = np.logspace(3, 7, 100)
    token = 2 * M1.num_kv_heads * M1.head_dim * 2  # Keys and values of a layer, bfloat16.
    softmax = M1.kinds.count(SOFTMAX)
    state = (M1.num_layers - softmax) * M1.num_heads * M1.head_dim**2 * 4
    ax.loglog(tokens, tokens * token * M1.num_layers / 1e9, "--", label="all 80 layers softmax")
    ax.loglog(
        tokens, (tokens * token * softmax + state) / 1e9, label="M1: 10 softmax, 70 lightning"
    )
    ax.loglog(tokens, np.full(100, state / 1e9), ":", label="of these, lightning states")
    ax.set(xlabel="tokens", ylabel="GB", title="What a sequence leaves behind")
    ax.legend()


def cispo_weight(ax: Axes) -> None:
    """Weight of ∇ log π of a token with advantage 1, against the importance ratio."""
    r = np.logspace(-1, 1, 400)
    ax.semilogx(r, np.minimum(r, 5), label="CISPO, cap 5")
    ax.semilogx(r, np.where(r > 1.2, 0, r), label="GRPO, ε = 0.2")
    ax.set(xlabel="r = π / π_old", ylabel="weight of ∇ log π", title="A token of a good sample")
    ax.legend()


def chunks(ax: Axes) -> None:
    """Token against token: squares inside chunks, states between them."""
    count, size = 4, 1.0
    for i in range(count):
        ax.add_patch(Rectangle((i, count - 1 - i), size, size, facecolor="C0", alpha=0.5))
        ax.text(i + 0.5, count - 0.5 - i, "q kᵀ ∘ decay", ha="center", va="center", fontsize=8)
        for j in range(i):
            ax.add_patch(Rectangle((j, count - 1 - i), size, size, facecolor="C1", alpha=0.15))
        if i:
            ax.text(i / 2, count - 0.5 - i, "through S", ha="center", va="center", fontsize=8)
    ax.set(xlim=(0, count), ylim=(0, count), aspect="equal", title="Four chunks of a sequence")
    ax.set(xticks=[], yticks=[], xlabel="keys and values", ylabel="queries, first at the top")


def main() -> None:
    """Draws all of them."""
    plt.rcParams["svg.hashsalt"] = "mmjax"  # The same file each time.
    for draw in (head_memory, sequence_bytes, cispo_weight, chunks):
        figure, ax = plt.subplots(figsize=(6, 3.4))
        draw(ax)
        path = IMAGES / f"{draw.__name__}.svg"
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None}, facecolor="white")
        plt.close(figure)


if __name__ == "__main__":
    main()
