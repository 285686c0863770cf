"""Show text as it comes, in two ways: as an iterator, and with a callback.

python examples/pipeline_streaming.py [MODEL]
"""

import sys

import mii
from mii.modeling.checkpoint import find_default_model

model = sys.argv[1] if len(sys.argv) > 1 else str(find_default_model())
with mii.pipeline(model) as pipe:
    for pieces in pipe.stream("Once upon a time", max_new_tokens=48):
        print("".join(piece.generated_text for piece in pieces), end="", flush=True)
    print("\n--")

    # Several prompts run side by side; `index` says whose piece it is.
    answers = ["", ""]

    def show(pieces):
        for piece in pieces:
            answers[piece.index] += piece.generated_text
            print(f"[{piece.index}] {piece.generated_text!r}", flush=True)

    pipe(["The sun is", "The moon is"], streaming_fn=show, max_new_tokens=8)
    print(answers)
