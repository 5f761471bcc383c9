"""What the loopback Hub checks in a card and in results files before it takes them."""

import json
import re

import yaml


# PyYAML lets through what a date (2026-99-99) or deep nesting makes Python raise.
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
STRING_KEYS = ("library_name", "license_name", "license_link", "pipeline_tag", "pretty_name")
LIST_KEYS = ("base_model", "datasets", "language", "license", "metrics", "tags")


def read_metadata(card: bytes) -> dict:
    """The metadata of a card as JSON has them; empty if it has none or is not valid."""
    text = card.decode(errors="replace")
    errors, warnings = check_card(text, "model")
    return {} if errors or warnings else json.loads(as_json(yaml.safe_load(FRONT_MATTER.match(text)[1])))


def as_json(data) -> str:
    return json.dumps(data, default=str, allow_nan=False)  # dates are written as text


def check_file(path: str, content: bytes, repo_type: str) -> list[str]:
    """Errors in a file that the Hub would have to understand: the card, and results of evaluations."""
    if path == "README.md":
        return check_card(content.decode(errors="replace"), repo_type)[0]
    if re.fullmatch(r"\.eval_results/[^/]+\.ya?ml", path):
        return check_results(content.decode(errors="replace"))
    return []


def check_card(card: str, repo_type: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about the metadata of a README.md."""
    match = FRONT_MATTER.match(card)
    if not match:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(match[1])
    except NOT_YAML as error:
        return [f"The metadata is not YAML: {error}"], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return [f"The metadata must be a mapping, not a {type(data).__name__}"], []
    try:
        as_json(data)
    except (TypeError, ValueError, RecursionError) as error:
        return [f"The metadata cannot be shown as JSON: {error}"], []
    errors = [f'"{key}" must be a string' for key in STRING_KEYS if not isinstance(data.get(key, ""), str)]
    errors += [
        f'"{key}" must be a string or a list of strings'
        for key in LIST_KEYS
        if not all_strings(list_of(data.get(key)))
    ]
    if repo_type == "model":
        errors += check_model_index(data.get("model-index"))
    return errors, []


def list_of(value) -> list:
    """Where one or several may stand: all of them."""
    return [] if value is None else value if isinstance(value, list) else [value]


def all_strings(values: list) -> bool:
    return all(isinstance(value, str) and value for value in values)


def get(value, *keys):
    """What stands under nested keys, or `None`."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def check_model_index(index) -> list[str]:
    """Errors in the evaluation results of a model card: a list of models, results, metrics."""
    if index is None:
        return []
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for m, model in enumerate(index):
        place = f'"model-index[{m}]'
        if not isinstance(get(model, "name"), str):
            errors.append(f'{place}.name" is required')
        results = get(model, "results")
        if not isinstance(results, list):
            errors.append(f'{place}.results" must be an array')
            continue
        for r, result in enumerate(results):
            errors += [
                f'{place}.results[{r}].{".".join(keys)}" is required'
                for keys in (("task", "type"), ("dataset", "type"), ("dataset", "name"))
                if not isinstance(get(result, *keys), str)
            ]
            metrics = get(result, "metrics")
            if not isinstance(metrics, list) or not all(
                isinstance(get(metric, "type"), str) and get(metric, "value") is not None for metric in metrics
            ):
                errors.append(f'{place}.results[{r}].metrics" must be an array of {{type, value}}')
    return errors


def check_results(text: str) -> list[str]:
    """Errors in a `.eval_results/*.yaml` file: a list of `{dataset: {id, task_id}, value}`."""
    try:
        data = yaml.safe_load(text)
    except NOT_YAML as error:
        return [f"The results are not YAML: {error}"]
    if not isinstance(data, list):
        return ["The results must be an array"]
    return [
        f'"[{i}]" must have dataset.id, dataset.task_id and value'
        for i, entry in enumerate(data)
        if not isinstance(get(entry, "dataset", "id"), str)
        or not isinstance(get(entry, "dataset", "task_id"), str)
        or get(entry, "value") is None
    ]
