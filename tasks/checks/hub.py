"""Models and data sets on the hub: reachable or in the cache, and licences that must be accepted."""

import urllib.error
import urllib.request
from pathlib import Path

from huggingface_hub import constants, get_token, try_to_load_from_cache

from dgpo_core.config.params import Params
from tasks.checks.finding import Finding, error, ok, warning

TIMEOUT = 4.0
GATED = ("meta-llama/",)  # owners whose models want their licence accepted on the hub's page


def hub(params: Params) -> list[Finding]:
    """Every model that `params` name which is no folder here."""
    names = {"models.student": params.models.student, "models.teacher": params.models.teacher}
    if params.retrieval.encoder.kind == "dense":
        names["retrieval.encoder.model"] = params.retrieval.encoder.model
    folders = {key: name for key, name in names.items() if Path(name).is_dir()}
    findings = [ok(key, f"{name}, a folder") for key, name in folders.items()]
    wanted = {key: name for key, name in names.items() if key not in folders}
    if not wanted:
        return [*findings, ok("hub", "nothing is needed from it")]
    reachable = _status(constants.ENDPOINT) is not None and not constants.HF_HUB_OFFLINE
    place = constants.ENDPOINT.removeprefix("https://")
    cached = {key for key, name in wanted.items() if in_cache(name)}
    if reachable:
        findings.append(ok("hub", f"{place} answers"))
    else:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{place} does not answer"
        missing = [wanted[key] for key in wanted if key not in cached]
        advice = (
            f"download elsewhere and copy {constants.HF_HUB_CACHE}, or name folders: {', '.join(missing)}"
        )
        findings.append(
            error("hub", why, advice) if missing else ok("hub", f"{why}; all models are in the cache")
        )
    return findings + [_model(key, name, key in cached, reachable) for key, name in wanted.items()]


def in_cache(name: str) -> bool:
    """Whether the model's configuration was downloaded (its weights come with it)."""
    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except ValueError:  # not a name of the hub
        return False


def _model(key: str, name: str, cached: bool, reachable: bool) -> Finding:
    if cached:
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
