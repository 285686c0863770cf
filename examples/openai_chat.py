"""Serve a model and talk to it with the `openai` package, streamed.

    python examples/openai_chat.py [MODEL]

Any program that speaks OpenAI's API can do the same: give it the base URL and the deployment's name as the model.
"""

import sys

from openai import OpenAI

import mii
from mii.modeling.checkpoint import find_default_model

model = sys.argv[1] if len(sys.argv) > 1 else str(find_default_model())
deployment = mii.serve(model, deployment_name="openai-example", enable_restful_api=True, progress=False)
try:
    config = deployment.mii_config
    client = OpenAI(base_url=f"http://localhost:{config.restful_api_port}/v1", api_key="none")
    stream = client.chat.completions.create(
        model="openai-example",
        messages=[{"role": "user", "content": "Tell me the capital of France."}],
        max_tokens=64,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        elif chunk.usage is not None:
            print(f"\n-- {chunk.usage.prompt_tokens} + {chunk.usage.completion_tokens} tokens")
finally:
    deployment.terminate_server()
