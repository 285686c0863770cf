"""Answer many prompts in one call and write them as lines of JSON.

    python examples/pipeline_batch.py [MODEL] > answers.jsonl

All prompts are given at once: the engine batches them, so the call takes little longer than its longest answer.
"""

import json
import sys

import mii
from mii.modeling.checkpoint import find_default_model

model = sys.argv[1] if len(sys.argv) > 1 else str(find_default_model())
animals = ["otter", "raven", "tortoise", "lynx", "heron", "badger", "salmon", "moth"]
prompts = [f"The {animal} is an animal that" for animal in animals]
with mii.pipeline(model, seed=1) as pipe:
    # Sampling is repeatable with a seed; an answer ends at the first full stop or line break.
    answers = pipe(prompts, max_new_tokens=32, temperature=0.7, top_p=0.95, stop=[".", "\n"])
for prompt, answer in zip(prompts, answers, strict=True):
    print(json.dumps({"prompt": prompt, **answer.to_msg_dict()}))
