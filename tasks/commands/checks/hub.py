"""Models and data sets on the hub: reachable or in the cache, and licences that must be accepted."""

import urllib.error
import urllib.request
from pathlib import Path

from huggingface_hub import HfUri, constants, get_token, try_to_load_from_cache

from dgpo_core.config.params import Params
from dgpo_core.datasets.published import SETTING, gold_addresses, hub_file, split_addresses
from dgpo_core.errors import UserError
from tasks.commands.checks.finding import Finding, error, ok, warning

TIMEOUT = 4.0
GATED = ("meta-llama/",)  # owners whose models want their licence accepted on the hub's page


def hub(params: Params) -> list[Finding]:
    """Every model and file of a data set that `params` name: here, in the cache, or on the hub."""
    models, files = _models(params), _files(params)
    there = [name for name in models.values() if not Path(name).is_dir()]
    there += [place for places in files.values() for place in places if place.startswith("hf://")]
    if not there:
        nothing = ok("hub", "nothing is needed from it")
        return [nothing, *_findings(models, files, reachable=False)]
    reachable = not constants.HF_HUB_OFFLINE and _status(constants.ENDPOINT) is not None
    findings = _findings(models, files, reachable)
    place = constants.ENDPOINT.removeprefix("https://")
    if reachable:
        return [ok("hub", f"{place} answers"), *findings]
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{place} does not answer"
    missing = [finding.subject for finding in findings if finding.level != "ok"]
    if not missing:
        return [ok("hub", f"{why}; all that is needed is here"), *findings]
    advice = (
        f"download elsewhere and copy {constants.HF_HUB_CACHE}, or name what is here: {', '.join(missing)}"
    )
    return [error("hub", why, advice), *findings]


def _models(params: Params) -> dict[str, str]:
    """Setting -> folder or name on the hub."""
    names = {"models.student": params.models.student, "models.teacher": params.models.teacher}
    if params.retrieval.has_encoder:
        names["retrieval.encoder.model"] = params.retrieval.encoder.model
    return names


def _files(params: Params) -> dict[str, list[str]]:
    """Setting -> places of a published index, and of the published data sets unless the world is embedded."""
    files = {"retrieval.vectors": params.retrieval.vectors} if params.retrieval.vectors else {}
    if params.data.source == "world":
        return files
    config, sets = params.data.published, params.questions
    named = {"questions": list(split_addresses(config, sets).values()), "corpus": [config.corpus]}
    named |= gold_addresses(config, sets)
    return files | {f"{SETTING}.{name}": places for name, places in named.items()}


def _findings(models: dict[str, str], files: dict[str, list[str]], reachable: bool) -> list[Finding]:
    found = [_model(setting, name, reachable) for setting, name in models.items()]
    return found + [_data(setting, places, reachable) for setting, places in files.items()]


def _data(setting: str, places: list[str], reachable: bool) -> Finding:
    """The files of a data set; the first that cannot be had speaks for all."""
    absent = 0
    for place in places:
        try:
            wanted = hub_file(place, setting)
        except UserError as why:
            return error(setting, str(why).removeprefix(f"{setting}: "), "correct it in params.yaml")
        if wanted is None:
            if not Path(place).is_file():
                return error(setting, f"{place}: no such file", "see docs/data.md for its format")
            continue
        cached = try_to_load_from_cache(
            wanted.id, wanted.path_in_repo, repo_type="dataset", revision=wanted.revision
        )
        if isinstance(cached, str):
            continue
        if not reachable:
            return error(setting, f"{place} is not in the cache", "make the hub reachable, or name a file")
        status = _status(_url(wanted), get_token())
        if status in (401, 403):
            page = f"{constants.ENDPOINT}/datasets/{wanted.id}"
            return error(setting, f"{place}: the hub answers {status}", f"ask for access at {page}")
        if status != 200:
            return error(setting, f"{place}: the hub answers {status}", "see whether the name is right")
        absent += 1
    if absent:
        return warning(
            setting, f"{absent} of {len(places)} files are not here yet", "its stage downloads them"
        )
    return ok(setting, f"{len(places)} files are here")


def _url(wanted: HfUri) -> str:
    revision = wanted.revision or "main"
    return f"{constants.ENDPOINT}/datasets/{wanted.id}/resolve/{revision}/{wanted.path_in_repo}"


def cached_file(name: str, file: str) -> Path | None:
    """Of a model, where it was downloaded."""
    try:
        found = try_to_load_from_cache(name, file)
    except ValueError:  # not a name of the hub
        return None
    return Path(found) if isinstance(found, str) else None  # else: not there, or known not to exist


def in_cache(name: str) -> bool:
    """Whether the model's configuration was downloaded (its weights come with it)."""
    return cached_file(name, "config.json") is not None


def _model(key: str, name: str, reachable: bool) -> Finding:
    if Path(name).is_dir():
        return ok(key, f"{name}, a folder")
    if in_cache(name):
        return ok(key, f"{name}, in the cache")
    page = f"{constants.ENDPOINT}/{name}"
    if name.startswith(GATED):
        advice = f"accept the licence at {page}, then set HF_TOKEN (or `hf auth login`)"
        if get_token() is None:
            return error(key, f"{name} is gated, and there is no token", advice)
        if reachable and _status(f"{page}/resolve/main/config.json", get_token()) != 200:
            return error(key, f"{name} is gated, and this token may not read it", advice)
    if not reachable:
        return error(
            key, f"{name} is neither a folder nor in the cache", "make the hub reachable, or name a folder"
        )
    status = _status(f"{page}/resolve/main/config.json", get_token())
    if status == 200:
        return warning(
            key, f"{name} is not here yet", "its stage downloads it; `hf download " + name + "` does it now"
        )
    return error(key, f"{name}: the hub answers {status}", "see whether the name is right")


def _status(url: str, token: str | None = None) -> int | None:
    """HTTP status, None without an answer."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, method="HEAD", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            return int(response.status)
    except urllib.error.HTTPError as answer:
        return answer.code
    except (OSError, ValueError):
        return None
