"""Give prompts as token ids, and see what the model reads and writes in tokens.

python examples/token_ids.py [MODEL]
"""

import sys

import mii
from mii.modeling.checkpoint import find_default_model

model = sys.argv[1] if len(sys.argv) > 1 else str(find_default_model())
with mii.pipeline(model) as pipe:
    ids = pipe.tokenizer.encode("The capital of France is")
    print("prompt ids:", ids)
    (from_ids,) = pipe([ids], max_new_tokens=8, do_sample=False)
    (from_text,) = pipe("The capital of France is", max_new_tokens=8, do_sample=False)
    print("answer:", repr(from_ids.generated_text), "ids:", pipe.tokenizer.encode(from_ids.generated_text))
    print("same as from text:", from_ids == from_text)
