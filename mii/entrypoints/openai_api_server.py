"""The OpenAI API over a deployment.

    python -m mii.entrypoints.openai_api_server --model path-or-id
    python -m mii.entrypoints.openai_api_server --model NAME --load-balancer localhost:50050

The second form uses a deployment that runs already. Keys that callers must show come from ``--api-key-file``,
``--api-keys`` or the environment variable ``API_KEYS``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from fastapi import FastAPI

from mii.entrypoints.http.app import build_app
from mii.entrypoints.http.health import add_health
from mii.entrypoints.http.metrics_page import add_metrics
from mii.entrypoints.http.settings import HttpSettings
from mii.entrypoints.openai.routes import BODIES, openai_router
from mii.entrypoints.options import parser
from mii.entrypoints.run import serve_app

__all__ = ["create_app", "main"]


def create_app(settings: HttpSettings) -> FastAPI:
    """Models, completions and chat completions, health and metrics.

    Args:
        settings: where the deployment is, what it is called, and who may use it.
    """
    app, service = build_app(settings, "mii: the OpenAI API", BODIES)
    add_health(app, service)
    add_metrics(app, service)
    app.include_router(openai_router(service))
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; see the module. Returns the exit code."""
    program = "python -m mii.entrypoints.openai_api_server"
    options = parser(program, "Serves the OpenAI API.", os.environ, openai=True)
    return serve_app(options, options.parse_args(arguments), create_app)


if __name__ == "__main__":
    sys.exit(main())
