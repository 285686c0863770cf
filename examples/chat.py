"""Talk to a chat model: one line of standard input is one turn; end with Ctrl-D.

    python examples/chat.py [MODEL]

The whole conversation is sent each time; what was computed for it before is found in the prefix cache.
"""

import sys

import mii
from mii.modeling.checkpoint import find_default_model

model = sys.argv[1] if len(sys.argv) > 1 else str(find_default_model())
messages = [{"role": "system", "content": "You answer in one short sentence."}]
with mii.pipeline(model) as pipe:
    for line in sys.stdin:
        messages.append({"role": "user", "content": line.strip()})
        prompt_ids = pipe.tokenizer.apply_chat_template(messages)
        answer = ""
        for pieces in pipe.stream(prompt_ids, max_new_tokens=64, do_sample=False):
            answer += "".join(piece.generated_text for piece in pieces)
        print(answer, flush=True)
        messages.append({"role": "assistant", "content": answer})
