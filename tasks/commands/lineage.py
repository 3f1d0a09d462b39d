"""`dgpo lineage`: print a registered model's lineage, or make the model again and compare the bytes."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from dgpo_core.config.params import PARAMS
from dgpo_core.errors import UserError
from dgpo_core.temporary import temporary_folder
from tasks.project.dvc import dvc_md5
from tasks.project.files import content_hash
from tasks.project.git import alone, git
from tasks.tracking import lineage
from tasks.tracking.registry import store

SAME, OTHER = 0, 1  # exit codes


def show(reference: str, as_json: bool, params: bool, verify: bool) -> int:
    """Print the lineage of a model in one of its forms. Return the exit code. Raises UserError."""
    with store() as registry:
        version = registry.named(reference)
        stored = registry.lineage_of(version)
    if verify:
        return verify_by_training(stored, version.reference)
    if params:
        print(lineage.parameters(stored), end="")
        return SAME
    differing = lineage.differences(stored)
    if as_json:
        commands = lineage.commands(stored, version.reference)
        whole = {**stored, "version": version.reference, "commands": commands, "differences": differing}
        print(json.dumps(whole, indent=2, ensure_ascii=False))
    else:
        print(lineage.text(stored, version.reference, differing))
    return SAME


def verify_by_training(stored: lineage.Lineage, reference: str) -> int:
    """Make the model again in a worktree of its commit, with an empty cache. Return the exit code.

    Takes as long as the training and all that it needs. Raises UserError when the commit does not have what
    the model was made of, and when a stage fails.
    """
    commit, dirty = stored["code"]["commit"], stored["code"]["dirty"]
    if not commit or dirty:
        raise UserError(
            f"it cannot be made again: no commit has its sources ({', '.join(dirty) or 'no git'})"
        )
    with temporary_folder("verify") as temporary:
        tree = temporary.resolve() / "tree"
        with alone(Path()):
            git("worktree", "add", "--quiet", "--detach", tree, commit, cwd=Path())
        try:
            (tree / PARAMS).write_text(lineage.parameters(stored), encoding="utf-8")
            # that folder's own cache: nothing is taken from an earlier run
            _run([sys.executable, "-m", "dvc", "cache", "dir", "--local", ".dvc/cache"], tree)
            print(f"making {stored['stage']} again in {tree}", flush=True)
            for name, stage in stored["stages"].items():
                if _differing(stage["outs"], tree):  # base models come with the commit
                    _run([sys.executable, "-m", "dvc", "repro", "--single-item", name], tree, shown=True)
            return _compare(stored, reference, tree)
        finally:
            with alone(Path()):
                git("worktree", "remove", "--force", tree, cwd=Path())


def _compare(stored: lineage.Lineage, reference: str, tree: Path) -> int:
    """Print which outputs came out with other bytes: the model, and those on the way to it."""
    (folder,) = stored["stages"][stored["stage"]]["outs"]
    others = [
        f"{name}: {path} is {dvc_md5(tree / path)}, was {stage['outs'][path]}"
        for name, stage in stored["stages"].items()
        for path in _differing(stage["outs"], tree)
        if path != folder
    ]
    digest = content_hash(tree / folder)
    if same := digest == stored["hash"]:
        print(f"{reference}: made again, byte for byte")
    else:
        print(f"{reference}: made again with other bytes (another machine, or other versions of libraries?)")
        print(f"  {folder}: sha256 is {digest}, was {stored['hash']}")
    if others:
        print("other bytes on the way to it:", *others, sep="\n  ")
    return SAME if same else OTHER


def _differing(outs: Mapping[str, str], tree: Path) -> list[str]:
    return [path for path, md5 in outs.items() if dvc_md5(tree / path) != md5]


def _run(command: list[str], folder: Path, shown: bool = False) -> None:
    """Run a command in `folder`. Raises UserError when it fails."""
    left = {"DGPO_PIPELINE_RUN", "DVC_STAGE", "DVC_ROOT", "MLFLOW_TRACKING_URI"}
    environment = {key: value for key, value in os.environ.items() if key not in left}
    # the worktree's sources, not ours; its runs go to a store of its own, which goes with it
    environment["PYTHONPATH"] = str(folder.resolve())
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=not shown, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr or "").strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise UserError(f"{' '.join(command)}: {last[0]}")
