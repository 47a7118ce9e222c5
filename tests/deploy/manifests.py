"""What kustomize makes of our manifests, as far as they use it: there is no kustomize to be had from PyPI."""

from __future__ import annotations

import base64
import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

Document = dict[str, Any]
_KNOWN = {"apiVersion", "kind", "namespace", "labels", "resources", "configMapGenerator", "images", "patches"}
_KNOWN |= {"secretGenerator", "generatorOptions"}
_CLUSTER_WIDE = {"Namespace"}


def load(path: Path) -> list[Document]:
    """Every document of a file."""
    return [dict(document) for document in YAML(typ="safe").load_all(path) if document is not None]


def render(folder: Path) -> list[Document]:
    """The documents of a kustomization.

    Raises:
        AssertionError: it names what is not there, or asks for what kustomize refuses.
    """
    (kustomization,) = load(folder / "kustomization.yaml")
    assert kustomization["kind"] == "Kustomization", folder
    assert set(kustomization) <= _KNOWN, f"{folder}: this renderer does not know {set(kustomization) - _KNOWN}"
    documents: list[Document] = []
    for name in kustomization.get("resources", []):
        path = folder / name
        assert path.exists(), f"{folder}: there is no {name}"
        documents += render(path) if path.is_dir() else load(_inside(folder, name))
    assert kustomization.get("generatorOptions", {}) in ({}, {"disableNameSuffixHash": True}), folder
    documents += [_config_map(folder, generator) for generator in kustomization.get("configMapGenerator", [])]
    documents += [_secret(folder, generator) for generator in kustomization.get("secretGenerator", [])]
    for patch in kustomization.get("patches", []):
        for change in load(_inside(folder, patch["path"])):
            documents = list(_patched(documents, change))
    for image in kustomization.get("images", []):
        found = [c for document in documents for c in containers(document) if c["image"].split(":")[0] == image["name"]]
        assert found, f"{folder}: nothing has the image {image['name']}"
        for container in found:
            container["image"] = f"{image.get('newName', image['name'])}:{image['newTag']}"
    if "namespace" in kustomization:
        for document in documents:
            if document["kind"] not in _CLUSTER_WIDE:
                document["metadata"]["namespace"] = kustomization["namespace"]
    return documents


def containers(document: Document) -> list[Document]:
    """Containers of a workload; none of anything else."""
    pod = document.get("spec", {}).get("template", {}).get("spec", {})
    return [*pod.get("initContainers", []), *pod.get("containers", [])]


def _inside(folder: Path, name: str) -> Path:
    """A file of a kustomization; kustomize reads none outside its folder, through links neither."""
    path = folder / name
    assert path.is_file(), f"{folder}: there is no {name}"
    assert os.path.realpath(path).startswith(os.path.realpath(folder) + os.sep), f"{name} is outside {folder}"
    return path


def _config_map(folder: Path, generator: Document) -> Document:
    data = {name: _inside(folder, name).read_text() for name in generator.get("files", [])}
    data |= dict(literal.split("=", 1) for literal in generator.get("literals", []))
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generator["name"]}, "data": data}


def _secret(folder: Path, generator: Document) -> Document:
    """A secret of files; a key is the name of its file."""
    paths = [_inside(folder, name) for name in generator["files"]]
    data = {path.name: base64.b64encode(path.read_bytes()).decode() for path in paths}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": generator["name"]},
        "type": "Opaque",
        "data": data,
    }


def _patched(documents: list[Document], patch: Document) -> Iterator[Document]:
    """A strategic merge, as far as it concerns maps, and lists of things with names."""
    target = (patch["kind"], patch["metadata"]["name"])
    targets = [document for document in documents if (document["kind"], document["metadata"]["name"]) == target]
    assert len(targets) == 1, f"a patch of {target}, which there is {len(targets)} times"
    for document in documents:
        if document is not targets[0]:
            yield document
        elif patch.get("$patch") != "delete":
            yield _merged(document, patch)


def _merged(base: Any, change: Any) -> Any:
    if isinstance(base, dict) and isinstance(change, dict):
        return {
            **copy.deepcopy(base),
            **{k: _merged(base[k], v) if k in base else copy.deepcopy(v) for k, v in change.items()},
        }
    is_named = isinstance(base, list) and isinstance(change, list) and all("name" in item for item in [*base, *change])
    if is_named and base:
        changes = {item["name"]: item for item in change}
        kept = [_merged(item, changes.pop(item["name"], {})) for item in base]
        return kept + list(changes.values())
    return copy.deepcopy(change)
