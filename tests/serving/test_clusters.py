"""Manifests and examples for clusters: they follow the schemas, where these are installed, and call mii with commands,
options and methods that exist.
"""

from __future__ import annotations

import asyncio
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mii.cli import _parser
from tests.serving.deployments import processes_of

DOCS = Path(__file__).resolve().parents[2] / "docs"
MANIFESTS = sorted((DOCS / "kubernetes").glob("*.yaml"))
ROUTES = {"/livez", "/health", "/healthz"}


def documents(file: Path) -> list[dict[str, Any]]:
    yaml = pytest.importorskip("yaml")
    return list(yaml.safe_load_all(file.read_text()))


def by_name(kind: str) -> dict[str, dict[str, Any]]:
    found = [document for document in documents(DOCS / "kubernetes" / "mii.yaml") if document["kind"] == kind]
    return {document["metadata"]["name"]: document for document in found}


def containers(document: dict[str, Any]) -> list[dict[str, Any]]:
    spec = document["spec"]
    pod = spec.get("predictor") or spec.get("template", {}).get("spec", {})
    return list(pod.get("containers", ()))


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_commands_are_those_that_mii_has_and_probes_ask_ports_that_they_open(file: Path) -> None:
    found = [container for document in documents(file) for container in containers(document)]
    assert found
    for container in found:
        program, *words = container["command"]
        args = _parser(words).parse_args(words)
        assert program == "mii"
        opened = {str(args.port), str(args.http_port)}
        names = {port.get("name"): str(port["containerPort"]) for port in container["ports"]}
        assert set(names.values()) <= opened
        assert {args.host, args.http_host} <= {"0.0.0.0", None}
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            probe = container.get(kind, {})
            if "httpGet" in probe:
                port = str(probe["httpGet"]["port"])
                assert names.get(port, port) == str(args.http_port)
                assert probe["httpGet"]["path"] in ROUTES
            if "grpc" in probe:
                assert str(probe["grpc"]["port"]) == str(args.port)


def test_services_select_the_pods_and_the_gateway_asks_for_the_headless_one() -> None:
    deployments, services = by_name("Deployment"), by_name("Service")
    for deployment, service in (("mii-replica", "mii-replicas"), ("mii-gateway", "mii")):
        template = deployments[deployment]["spec"]["template"]
        assert services[service]["spec"]["selector"] == template["metadata"]["labels"]
        assert deployments[deployment]["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
    assert services["mii-replicas"]["spec"]["clusterIP"] == "None"
    (port,) = services["mii-replicas"]["spec"]["ports"]
    words = containers(deployments["mii-gateway"])[0]["command"]
    assert words[words.index("--replicas") + 1] == f"mii-replicas:{port['port']}"


def test_manifests_follow_the_schemas_of_kubernetes() -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate brings the schemas")
    for document in documents(DOCS / "kubernetes" / "mii.yaml"):
        validator.validate(document, "1.30", strict=True)


def fields(*required: str, **properties: Any) -> dict[str, Any]:
    """An object that has these fields and no others."""
    names = {name.rstrip("_"): value for name, value in properties.items()}
    return {"type": "object", "properties": names, "additionalProperties": False, "required": list(required)}


TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
PROBE = fields(
    httpGet=fields("port", path=TEXT, port={"type": ["integer", "string"]}),
    periodSeconds=COUNT,
    timeoutSeconds=COUNT,
    failureThreshold=COUNT,
)
CONTAINER = fields(
    "name",
    name={"const": "kserve-container"},  # what KServe looks for among several
    image=TEXT,
    command={"type": "array", "items": TEXT},
    env={"type": "array", "items": fields("name", name=TEXT, value=TEXT)},
    ports={
        "type": "array",
        "items": fields("containerPort", containerPort=COUNT, protocol={"enum": ["TCP", "UDP", "SCTP"]}),
    },
    resources=fields(limits={"type": "object", "additionalProperties": {"type": ["integer", "string"]}}),
    readinessProbe=PROBE,
)
INFERENCE_SERVICE = fields(
    "apiVersion",
    "kind",
    "metadata",
    "spec",
    apiVersion={"const": "serving.kserve.io/v1beta1"},
    kind={"const": "InferenceService"},
    metadata=fields("name", name={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}),
    spec=fields(
        "predictor",
        predictor=fields(
            minReplicas=COUNT,
            maxReplicas=COUNT,
            scaleMetric={"enum": ["cpu", "memory", "concurrency", "rps"]},
            scaleTarget=COUNT,
            containers={"type": "array", "items": CONTAINER, "minItems": 1},
        ),
    ),
)
"""The fields of an InferenceService that the manifest uses, with the types that KServe's resource definition gives them
(v1beta1). The definition itself is two megabytes; the whole manifest was compared with that of 2026-08-21 by hand.
"""


def test_the_manifest_for_kserve_has_fields_of_an_inference_service_only() -> None:
    jsonschema = pytest.importorskip("jsonschema_rs", reason="pip install schemathesis brings it")
    (document,) = documents(DOCS / "kubernetes" / "kserve.yaml")
    jsonschema.validate(INFERENCE_SERVICE, document)
    document["spec"]["predictor"]["maxReplica"] = 4
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.validate(INFERENCE_SERVICE, document)
    (container,) = containers(document)
    model = container["command"][2]
    assert (model, container["env"][0]["name"]) == ("/mnt/models", "STORAGE_URI")  # where KServe puts what it names


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)]+)\)", (DOCS / "clusters.md").read_text())
    assert targets
    assert [target for target in targets if not (DOCS / target).exists()] == []


def test_commands_of_the_text_exist() -> None:
    text = (DOCS / "clusters.md").read_text()
    lines = re.findall(r"^(mii (?:serve|balance) .*?)(?: +#.*)?$", text, re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        words = line.split()[1:]
        _parser(words).parse_args(words)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray, or where it is not installed, a stand-in whose decorator leaves the class as it is."""

    def deployment(*, num_replicas: int, max_ongoing_requests: int, ray_actor_options: dict[str, float]) -> Any:
        return lambda kind: kind

    if importlib.util.find_spec("ray") is None:
        module = ModuleType("ray")
        module.serve = SimpleNamespace(deployment=deployment)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "ray", module)


def test_the_example_for_ray_answers_is_healthy_and_leaves_nothing(ray: None, tiny_llama: Path, cache: Path) -> None:
    spec = importlib.util.spec_from_file_location("ray_serve", DOCS / "kubernetes" / "ray_serve.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    kind = getattr(example.Model, "func_or_class", example.Model)

    async def ask(model: Any) -> list[dict[str, Any]]:
        await model.check_health()

        async def body() -> dict[str, Any]:
            return {"prompts": ["DeepSpeed is", "A"], "max_new_tokens": 4, "ignore_eos": True}

        return list(await model(SimpleNamespace(json=body)))

    model = kind(str(tiny_llama))
    assert [answer["generated_length"] for answer in asyncio.run(ask(model))] == [4, 4]
    model.__del__()
    del model.server
    assert processes_of(cache) == {}
