"""Draws an attention map (probabilities, [queries, keys], .npy) with the tokens of the text beside it.

    heed run --input examples/data/minilm_layer.safetensors --map out/map.npy --head 1
    python examples/python/draw_attention_map.py out/map.npy examples/data/minilm_layer.safetensors out/map.png
"""
import json
import pathlib
import struct
import sys

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first)


def metadata(path):
    """The strings that a .safetensors file carries."""
    with open(path, "rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        return json.loads(file.read(size)).get("__metadata__", {})


def draw(probabilities, info, path):
    queries, keys = probabilities.shape
    tokens = json.loads(info["tokens"])
    figure, axes = plt.subplots(figsize=(15, 15.6), layout="constrained")
    # The square root shows weak links beside strong ones: a tenth of the weight is a third of the brightness.
    image = axes.imshow(np.sqrt(probabilities), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks(range(keys), tokens[:keys], rotation=90, fontsize=6)
    axes.set_yticks(range(queries), tokens[:queries], fontsize=6)
    axes.tick_params(length=0, labeltop=True)
    axes.set_xlabel("key: the token that is looked at")
    axes.set_ylabel("query: the token that looks")
    axes.set_title(f"{info.get('model', '')}, layer {info.get('layer', '?')}\n{info.get('text', '')}\n")
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.01, label="attention probability")
    ticks = [0, 0.01, 0.05, 0.1, 0.25, 0.5, 1]
    bar.set_ticks(np.sqrt(ticks), labels=[f"{tick:g}" for tick in ticks])
    figure.savefig(path, dpi=130)
    plt.close(figure)


def strongest(probabilities, tokens, count=6):
    """The strongest links from one whole word to another."""
    words = [i for i, token in enumerate(tokens) if token.isalpha()]
    pairs = [(tokens[i], tokens[j], probabilities[i, j]) for i in words for j in words if i != j]
    return sorted(pairs, key=lambda pair: -pair[2])[:count]


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    map_path, input_path, picture_path = map(pathlib.Path, sys.argv[1:])
    probabilities, info = np.load(map_path).squeeze(), metadata(input_path)
    draw(probabilities, info, picture_path)
    for query, key, weight in strongest(probabilities, json.loads(info["tokens"])):
        print(f"  {query:>14} looks at {key:<14} {weight:.2f}")
