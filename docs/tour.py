"""A tour of the method from Python, cell by cell (Jupyter, VS Code), or at once: `PYTHONPATH=. python docs/tour.py`.

It asks the miniature that the repository ships, in its own little world of pictures. MODEL in the environment names
another checkpoint; docs/python.md says what each call takes and gives.
"""

# %% A model, of any family that we know: a folder, or a name of the hub
import os
from pathlib import Path

import numpy as np

from llava import open_model
from llava.adaptviz import AdaptViz, Bands
from scripts.miniature.prompts import sample_prompt

vlm = open_model(os.environ.get("MODEL", "scripts/miniature/base"))
OUTPUT = Path(os.environ.get("OUTPUT", "output/tour"))
OUTPUT.mkdir(parents=True, exist_ok=True)

# %% A question about one of several pictures, which are PIL pictures or paths
rng = np.random.default_rng(0)
prompts = [sample_prompt(rng, "test", "sequence", 3) for _ in range(8)]
first = prompts[0]
pictures, asked = first.pictures(), first.text.rpartition("\n")[2]
reply = vlm.ask(pictures, asked, max_new_tokens=8)
print(f"{asked}  ->  {reply.text}   (true: {first.answer})")
print(f"R {reply.ratio:.3f}: share of the image attention on Image{reply.target}; by image", np.round(reply.shares, 3))
print("by layer", np.round(reply.ratio_by_layer, 3), f"  confidence {reply.confidence:.3f}")

# %% Where it looked while it answered
reply.heatmap(height=200).save(OUTPUT / "plain.png")

# %% The same with the attention on that image's tokens scaled (AdaptViz): its defaults, and a factor of one's own
steered = vlm.ask(pictures, asked, steer="target", max_new_tokens=8)
print(f"target: {steered.text}, R {steered.ratio:.3f}, scaled by {steered.scale}")
for factor in (1.0, 2.0, 4.0):
    own = vlm.ask(pictures, asked, steer=AdaptViz(bands=Bands.fixed(factor)), max_new_tokens=8)
    print(f"factor {factor}: {own.text}, R {own.ratio:.3f}")

# %% An answer that somebody else gave: what the model looks at while it says it, by one pass
others = vlm.look(pictures, asked, [first.answer, *first.others])
for other in others:
    print(f"{other.text:<10} R {other.ratio:.3f}  perplexity {other.perplexity:.2f}")

# %% Many prompts at once; who looked at the right image, and who answered right?
replies = vlm.ask([p.pictures() for p in prompts], [p.text for p in prompts], max_new_tokens=8)
for prompt, one in zip(prompts, replies, strict=True):
    looked = int(np.argmax(one.shares)) + 1
    print(f"asked about Image{one.target}, looked at Image{looked} most: {one.text} (true: {prompt.answer})")
