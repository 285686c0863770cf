"""mii on Ray Serve: in each of Ray's replicas one of mii's, as processes that end with it.

serve run ray_serve:app model=/models/model
curl -d '{"prompts": ["DeepSpeed is"], "max_new_tokens": 32}' localhost:8000
"""

import os
from typing import Any

from ray import serve
from starlette.requests import Request

from mii.backend import MIIClient, MIIServer
from mii.config import MIIConfig


@serve.deployment(num_replicas=2, max_ongoing_requests=256, ray_actor_options={"num_gpus": 1})
class Model:
    def __init__(self, model: str) -> None:
        config = MIIConfig(
            deployment_name=f"ray-{os.getpid()}", model_config={"model_name_or_path": model}, replica_only=True
        )
        self.server = MIIServer(config, attached=True)
        self.client = MIIClient(self.server.mii_config)

    async def __call__(self, request: Request) -> list[dict[str, Any]]:
        body = await request.json()
        answers = await self.client.generate_async(body.pop("prompts"), **body)
        return [answer.to_msg_dict() for answer in answers or []]

    async def check_health(self) -> None:
        health = await self.client.health_async()
        if not health["ready"]:
            raise RuntimeError(health["reason"])

    def __del__(self) -> None:
        if hasattr(self, "server"):
            self.server.terminate()


def app(args: dict[str, str]) -> Any:
    return Model.bind(args["model"])
