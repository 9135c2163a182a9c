import json
import re
from pathlib import Path
from typing import Any

from app.main import build_api
from app.schemas import Prediction
from models.bundle import OPTIONAL_TASKS, REQUIRED_TASKS
from tests.conftest import ROOT

COMMITTED = ROOT / "docs" / "openapi.json"
# As it was when this major version of the API was released; a new one gets a new file.
RELEASED = Path(__file__).parent / "openapi-1.json"
PROBLEM = "application/problem+json"


def test_the_committed_description_is_the_service_s() -> None:
    assert json.loads(COMMITTED.read_text()) == build_api().openapi(), "run `make docs`"


def test_every_schema_that_is_named_is_there() -> None:
    described = json.dumps(build_api().openapi())
    schemas = build_api().openapi()["components"]["schemas"]
    named = set(re.findall(r"#/components/schemas/(\w+)", described))
    assert "ProblemBody" in named
    assert named <= set(schemas)


def test_an_answer_has_a_place_for_every_task_of_a_bundle() -> None:
    fields = Prediction.model_fields
    assert set(fields) == REQUIRED_TASKS | OPTIONAL_TASKS
    assert {name for name, field in fields.items() if field.is_required()} == REQUIRED_TASKS


def test_no_breaking_change() -> None:
    before, after = json.loads(RELEASED.read_text()), build_api().openapi()
    assert breaking_changes(before, after) == [], "raise the major version in app/main.py first"
    assert before["info"]["version"].split(".")[0] == after["info"]["version"].split(".")[0]


def test_breaking_changes_are_found() -> None:
    before = build_api().openapi()

    def after(change) -> list[str]:
        changed = json.loads(json.dumps(before))
        change(changed)
        return breaking_changes(before, changed)

    def schema(document: dict[str, Any], name: str) -> dict[str, Any]:
        return document["components"]["schemas"][name]

    def post(document: dict[str, Any]) -> dict[str, Any]:
        return document["paths"]["/predict"]["post"]

    def json_of(answer: dict[str, Any]) -> dict[str, Any]:
        return answer["content"]["application/json"]["schema"]

    assert after(lambda d: d["paths"].pop("/model"))
    assert after(lambda d: post(d)["responses"].pop("200"))
    assert after(lambda d: post(d)["responses"]["200"]["headers"].popitem())
    assert after(lambda d: post(d)["responses"]["400"]["content"].popitem())
    assert after(lambda d: json_of(post(d)["responses"]["200"]).update({"$ref": "Health"}))
    assert after(lambda d: schema(d, "Melanoma")["properties"].pop("threshold"))
    assert after(lambda d: schema(d, "Melanoma")["required"].remove("probability"))
    assert after(lambda d: schema(d, "Age")["properties"]["years"].update(type="string"))
    assert after(lambda d: schema(d, "Health")["properties"]["status"]["enum"].pop())
    assert after(lambda d: post(d)["parameters"][0].update(required=True))
    assert after(lambda d: post(d)["parameters"].clear())
    assert after(lambda d: post(d)["parameters"][0]["schema"].update(type="integer"))
    assert after(lambda d: post(d)["requestBody"]["content"].pop("image/png"))
    assert not after(lambda d: d["paths"].update({"/new": {"get": {}}}))
    assert not after(lambda d: schema(d, "Health")["properties"].update(since={"type": "string"}))
    assert not after(lambda d: d["info"].update(version="2.0.0") or d["paths"].pop("/model"))


def breaking_changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What a caller written for `before` may miss in `after`, unless its major version rose."""
    if after["info"]["version"].split(".")[0] != before["info"]["version"].split(".")[0]:
        return []
    found = []
    for path, methods in before["paths"].items():
        for method, old in methods.items():
            new = after["paths"].get(path, {}).get(method)
            if new is None:
                found.append(f"{method} {path} is gone")
            else:
                found += [f"{method} {path}: {what}" for what in _of_operation(old, new)]
    for name, old in before["components"]["schemas"].items():
        new = after["components"]["schemas"].get(name)
        found += [f"schema {name} is gone"] if new is None else _of_schema(name, old, new)
    return found


def _of_operation(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    found = []
    for key in ("responses", "requestBody"):
        was = old.get(key, {}).get("content", {}) if key == "requestBody" else old.get(key, {})
        now = new.get(key, {}).get("content", {}) if key == "requestBody" else new.get(key, {})
        found += [f"{key} {name} is gone" for name in was if name not in now]
    was = {parameter["name"]: parameter for parameter in old.get("parameters", [])}
    now = {parameter["name"]: parameter for parameter in new.get("parameters", [])}
    found += [f"parameter {name} is gone" for name in was if name not in now]
    found += [
        f"parameter {name} has another type"
        for name in was
        if name in now and _shape(was[name]["schema"]) != _shape(now[name]["schema"])
    ]
    for status, answer in old.get("responses", {}).items():
        found += _of_answer(status, answer, new.get("responses", {}).get(status, answer))
    return found + [
        f"parameter {name} is required"
        for name, parameter in now.items()
        if parameter.get("required") and not was.get(name, {}).get("required")
    ]


def _of_answer(status: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    headers = [name for name in old.get("headers", {}) if name not in new.get("headers", {})]
    found = [f"header {name} of {status} is gone" for name in headers]
    described = dict(old.get("content", {}))
    if PROBLEM in described:  # 1.0.0 named both, where this alone was ever sent
        described.pop("application/json", None)
    for media_type, was in described.items():
        now = new.get("content", {}).get(media_type)
        if now is None:
            found.append(f"{media_type} of {status} is gone")
        elif "schema" in was and _shape(was["schema"]) != _shape(now.get("schema")):
            found.append(f"{media_type} of {status} is another schema")
    return found


def _of_schema(name: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    found = [
        f"{name}.{field} is no longer always there"
        for field in old.get("required", [])
        if field not in new.get("required", [])
    ]
    for field, was in old.get("properties", {}).items():
        now = new.get("properties", {}).get(field)
        if now is None:
            found.append(f"{name}.{field} is gone")
        elif _shape(was) != _shape(now):
            found.append(f"{name}.{field} has another type")
    if _shape(old) != _shape(new):
        found.append(f"{name} has another type")
    return found


def _shape(schema: Any) -> Any:
    """A schema without what only describes it."""
    if isinstance(schema, dict):
        words = {"title", "description", "default", "example", "properties", "required"}
        return {key: _shape(value) for key, value in schema.items() if key not in words}
    return [_shape(value) for value in schema] if isinstance(schema, list) else schema
